"""How fast is ConvMixer on a GPU, by class, layout, precision and compiler?"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.on_gpu.timing import measure

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from convmixer import LAYOUTS, SHAPES, Shape, networks

BATCHES = {"256/8-k5-p2": 512, "256/8-k9-p1": 128, "768/32-k7-p7": 64}
TINY = {"tiny": Shape(8, 2, 5, 2, 16, 4)}


def convmixer_tables(job: Any) -> None:
    """Time training steps and inference of the paper's definition, timm's class and ours."""
    shapes = TINY if job.smallest else {name: replace(SHAPES[name], batch=BATCHES[name]) for name in SHAPES}
    for name, shape in shapes.items():
        for precision in ("float32",) if job.smallest else ("bf16", "float32"):
            compiled = not job.smallest and name == "256/8-k5-p2" and precision == "bf16"
            time_networks(job, name, shape, precision, compiled)
            if job.clock.over():
                return


def training_step(net: nn.Module, x: Tensor, targets: Tensor, precision: str) -> None:
    """Take one forward and backward pass."""
    with torch.autocast(x.device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext():
        loss = nn.functional.cross_entropy(net(x).float(), targets)
    loss.backward()
    net.zero_grad(set_to_none=True)


def inference(net: nn.Module, x: Tensor, _: Tensor, precision: str) -> None:
    """Take one forward pass without a graph."""
    with (
        torch.no_grad(),
        torch.autocast(x.device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext(),
    ):
        net(x)


def time_networks(job: Any, name: str, shape: Shape, precision: str, compiled: bool) -> None:
    """Add the rows of one network and precision; the paper's definition in the contiguous layout is the base."""
    torch.compiler.reset()
    pixels = torch.randn(shape.batch, 3, shape.pixels, shape.pixels, device=job.device)
    targets = torch.arange(shape.batch, device=job.device) % 10
    base: dict[str, float] = {}
    for way, net, layout in networks(shape, job.device, compiled):
        x = pixels.contiguous(memory_format=LAYOUTS[layout])
        for phase, run in (("train", training_step), ("eval", inference)):
            if phase == "eval" and "compiled" in way:
                continue
            row = {"net": name, "batch": shape.batch, "precision": precision, "phase": phase, "way": way}
            try:
                net.train(phase == "train")
                timing = measure(
                    lambda run=run, net=net, x=x: run(net, x, targets, precision), job.device, seconds=0.5, most=40
                )
            except Exception as error:
                job.results.add("convmixer", **row, failed=f"{type(error).__name__}: {error}"[:160])
                continue
            base.setdefault(phase, timing.median_ms)
            job.results.add_timing(
                "convmixer", timing, base[phase], **row, images_per_second=1e3 * shape.batch / timing.median_ms
            )
        del net
        if job.clock.over():
            return
