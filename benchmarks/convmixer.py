"""How fast is our ConvMixer beside the paper's definition and timm's class, by memory layout, precision and compiler?

    python benchmarks/convmixer.py [--shapes 256/8-k5-p2 …] [--rounds 5] [--threads 1] [--device cpu] [--compile]

Every way takes the same batch of one shape, in a process of its own as with a user: in one process the memory of the
others keeps the heap from shrinking between calls, and hides what a network pays for fresh pages. Ways take turns
within a round, so that a drift of the machine's speed touches all. Medians over the rounds, and ratios to the paper's
definition in the contiguous layout: above 1 is faster. The weights are equal; what differs is the memory layout and the
class.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from espalier.checkpoints.convmixer import convert_state
from espalier.models import ConvMixer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from reference.convmixer_original import original_convmixer
from timings import Row, add_option, record, summary

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Shape:
    """One network and the batch it is timed on."""

    dim: int
    depth: int
    kernel: int
    patch: int
    pixels: int
    batch: int


WARM, CALLS = 5, 2  # calls before the first round, and those that count in a turn

SHAPES = {
    "256/8-k5-p2": Shape(256, 8, 5, 2, 32, 16),
    "256/8-k9-p2": Shape(256, 8, 9, 2, 32, 16),
    "256/8-k9-p1": Shape(256, 8, 9, 1, 32, 4),
    "768/32-k7-p7": Shape(768, 32, 7, 7, 224, 2),
}


@dataclass(frozen=True)
class Job:
    """What one process times."""

    way: str
    shape: Shape
    precision: str
    kind: str
    device: str
    compiled: bool
    threads: int


def networks(shape: Shape, device: str, compiled: bool) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield every way: its name, its network and the layout of its input."""
    arguments = (shape.dim, shape.depth, shape.kernel, shape.patch)
    ours = ConvMixer(*arguments, num_classes=10)
    plain = original_convmixer(*arguments, 10)
    plain.load_state_dict(convert_state(ours.state_dict(), "original"))
    ways: dict[str, nn.Module] = {"plain": plain, "ours": ours}
    if torch.version.cuda is None:
        import reference.torchvision_operators  # noqa: F401  # timm imports torchvision
    try:
        from timm.models.convmixer import ConvMixer as TimmConvMixer
    except ImportError:
        print("timm cannot be imported: its class is left out")
    else:
        ways["timm"] = TimmConvMixer(*arguments, num_classes=10)
        ways["timm"].load_state_dict(ours.state_dict())
    for name, net in ways.items():
        for layout, memory_format in LAYOUTS.items():
            placed = copy.deepcopy(net).to(device).to(memory_format=memory_format)
            yield f"{name}, {layout}", placed, layout
            if compiled:
                yield f"{name}, {layout}, compiled", torch.compile(copy.deepcopy(placed)), layout


def seconds(function: Callable[[], object], device: str) -> float:
    """Return how long one call takes, the device's queue included."""
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def training_step(net: nn.Module, x: Tensor, autocast: Callable[[], Any]) -> None:
    """Take one forward and backward pass."""
    net.train()
    net.zero_grad(set_to_none=True)
    with autocast():
        loss = net(x).float().square().mean()
    loss.backward()


def inference(net: nn.Module, x: Tensor, autocast: Callable[[], Any]) -> None:
    """Take one forward pass without a graph."""
    net.eval()
    with torch.no_grad(), autocast():
        net(x)


def serve(pipe: Connection, job: Job) -> None:
    """Build one way and time a call for every message: runs in a process of its own."""
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    shape, device = job.shape, job.device
    net, layout = next((net, layout) for name, net, layout in networks(shape, device, job.compiled) if name == job.way)
    x = torch.randn(shape.batch, 3, shape.pixels, shape.pixels, device=device)
    x = x.contiguous(memory_format=LAYOUTS[layout])
    run = training_step if job.kind == "training step" else inference

    def autocast() -> Any:
        return torch.autocast(device, torch.bfloat16) if job.precision == "bf16" else nullcontext()

    for _ in range(WARM):
        run(net, x, autocast)
    pipe.send(None)
    while pipe.recv():
        run(net, x, autocast)  # what ran in between took the caches
        pipe.send([seconds(lambda: run(net, x, autocast), device) for _ in range(CALLS)])


def measure(shape: Shape, precision: str, kind: str, options: argparse.Namespace) -> dict[str, Row]:
    """Return the times of every way of training or of inference."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    with torch.device("meta"):
        ways = [name for name, _, _ in networks(shape, "meta", options.compile)]
    for way in ways:
        pipes[way], there = context.Pipe()
        job = Job(way, shape, precision, kind, options.device, options.compile, torch.get_num_threads())
        context.Process(target=serve, args=(there, job), daemon=True).start()
        pipes[way].recv()  # one after the other
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(options.rounds):
        for way, pipe in pipes.items():
            pipe.send(True)
            times[way] += pipe.recv()
    for pipe in pipes.values():
        pipe.send(False)
    return {way: summary(taken) for way, taken in times.items()}


def main() -> None:
    """Print the medians and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=list(SHAPES))
    parser.add_argument("--precisions", nargs="+", choices=["float32", "bf16"], default=["float32", "bf16"])
    parser.add_argument(
        "--kinds", nargs="+", choices=["training step", "inference"], default=["training step", "inference"]
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--blocks", type=int, default=0, help="depth to time, instead of the network's own")
    parser.add_argument("--batch", type=int, default=0, help="0 for the shape's own")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--compile", action="store_true")
    add_option(parser)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {where}, medians of {options.rounds} rounds")
    for name in options.shapes:
        shape = SHAPES[name]
        shape = replace(shape, depth=options.blocks or shape.depth, batch=options.batch or shape.batch)
        for precision in options.precisions:
            for kind in options.kinds:
                rows = measure(shape, precision, kind, options)
                base = rows["plain, contiguous"]["ms"]
                case = f"{name}, {shape.depth} blocks, batch {shape.batch}, {precision}, {kind}, a process each"
                if torch.get_num_threads() > 1:
                    case += f", {torch.get_num_threads()} threads"
                print(f"\n{case}")
                for way, row in rows.items():
                    print(f"  {way:<36} {row['ms']:9.1f} ms  {base / row['ms']:5.2f}×")
                record(options.record, "convmixer", case, rows, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
