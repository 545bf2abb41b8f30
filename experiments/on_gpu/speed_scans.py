"""How fast are Mamba blocks and their scans on a GPU beside transformers', mamba.py's and fla's?"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from espalier.nn import ssd
from experiments.on_gpu.timing import measure

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from peers import plain_blocks, pscan
from peers.minimal_ssd import ssd_minimal
from scans import DIM, SHAPES, mixer, transformers_block

LARGER = {"mamba1": [(32, 1024), (8, 4096)], "mamba2": [(32, 1024), (8, 16384)]}


def blocks(family: str, length: int) -> dict[str, Callable[[], nn.Module]]:
    """Return the name and the maker of every block, all with the same weights; ours come first."""
    ours: dict[str, Callable[[], nn.Module]] = {"espalier": lambda: mixer(family)}
    if family == "mamba2":
        return ours | {
            "transformers, chunk 256 (default)": lambda: transformers_block("mamba2"),
            "transformers, chunk 64": lambda: transformers_block("mamba2", chunk=64),
            "minimal listing, chunk 64": lambda: plain_blocks.PlainMamba2(mixer("mamba2"), ssd_minimal),
        }
    theirs: dict[str, Callable[[], nn.Module]] = {
        "mamba.py's parallel scan": lambda: plain_blocks.PlainMamba1(mixer("mamba1"), pscan.selective_scan_parallel)
    }
    if length <= 256:
        theirs["transformers, plain loop"] = lambda: transformers_block("mamba1")
    return ours | theirs


def scan_tables(job: Any) -> None:
    """Time blocks, forward and backward, then the Mamba-2 scan alone against fla's kernel."""
    for family in ("mamba1", "mamba2"):
        shapes = [(2, 64)] if job.smallest else SHAPES[family] + LARGER[family]
        for shape in shapes:
            time_blocks(job, family, shape)
            if job.clock.over():
                return
    for shape in [(2, 64)] if job.smallest else [(32, 64), (8, 1024), (8, 4096), (8, 16384)]:
        time_ssd(job, shape)
        if job.clock.over():
            return


def step(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Run forward and backward and return (output, gradient of the input)."""
    x = x.detach().requires_grad_()
    y = block(x)
    y.square().mean().backward()
    for parameter in block.parameters():
        parameter.grad = None
    assert x.grad is not None
    return y.detach(), x.grad


def time_blocks(job: Any, family: str, shape: tuple[int, int]) -> None:
    """Add the rows of one shape: times, and how far the output and the gradient are from ours."""
    x = torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(1)).to(job.device)
    base, exact = None, None
    for way, make in blocks(family, shape[1]).items():
        row = {"family": family, "batch": shape[0], "length": shape[1], "way": way}
        try:
            block = make().to(job.device)
            found = step(block, x)
            exact = exact or found
            error = max(float((one - two).norm() / two.norm()) for one, two in zip(found, exact, strict=True))
            timing = measure(lambda block=block: step(block, x), job.device, seconds=0.5, most=50)
        except Exception as error_met:
            job.results.add("scans", **row, failed=f"{type(error_met).__name__}: {error_met}"[:160])
            continue
        base = base or timing.median_ms
        # Ours over theirs: how many times faster ours is stands beside the peer.
        job.results.add("scans", **row, **timing._asdict(), ours_faster=timing.median_ms / base, difference=error)
        if job.clock.over():
            return


def time_ssd(job: Any, shape: tuple[int, int]) -> None:
    """Add the rows of the Mamba-2 recurrence alone, 8 heads of 64, state 64, against fla's gated linear attention."""
    batch, length = shape
    heads, width, state = (2, 8, 8) if job.smallest else (8, 64, 64)
    torch.manual_seed(0)
    normal = torch.randn(batch, length, 1, 2 * state, device=job.device) / state**0.5
    inputs = {
        "x": torch.randn(batch, length, heads, width, device=job.device),
        "delta": torch.rand(batch, length, heads, device=job.device) * 0.1 + 1e-3,
        "a": -torch.rand(heads, device=job.device) * 15 - 1,
        "b": normal[..., :state].contiguous(),
        "c": normal[..., state:].contiguous(),
    }

    def ours(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        y = ssd(x, delta, a, b, c)
        assert isinstance(y, Tensor)
        return y

    def fla(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        from fla.ops.simple_gla import chunk_simple_gla

        b, c = (m.expand(-1, -1, heads, -1).contiguous() for m in (b, c))
        y, _ = chunk_simple_gla(q=c, k=b, v=x * delta[..., None], g=delta * a, scale=1.0)
        return y

    base, exact = None, None
    for precision, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        for way, run in (("espalier ssd", ours), ("fla chunk_simple_gla", fla)):
            row = {"batch": batch, "length": length, "precision": precision, "way": way}
            leaves = {
                key: value.to(torch.float32 if key in ("delta", "a") else dtype).requires_grad_()
                for key, value in inputs.items()
            }

            def call(run: Callable[..., Tensor] = run, leaves: dict[str, Tensor] = leaves) -> Tensor:
                y = run(**leaves)
                torch.autograd.grad(y.float().square().sum(), list(leaves.values()))
                return y.detach().float()

            try:
                found = call()
                exact = found if exact is None else exact
                timing = measure(call, job.device, seconds=0.5, most=50)
            except Exception as error:
                job.results.add("ssd alone", **row, failed=f"{type(error).__name__}: {error}"[:160])
                continue
            base = base or timing.median_ms
            difference = float((found - exact).norm() / exact.norm())
            job.results.add(
                "ssd alone", **row, **timing._asdict(), ours_faster=timing.median_ms / base, difference=difference
            )
