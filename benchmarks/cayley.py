"""How fast is a Cayley convolution beside the original's formula, its peers and a free convolution?

    python benchmarks/cayley.py [--quick] [--shapes A B C S] [--repeats 9] [--threads 1]

One layer per contender and shape, batch norm or activation none. A training step is a forward and a backward pass with
the gradients of the input and of every parameter; an evaluation is a forward pass without gradients, after a first one
has filled any cache (orthogonium's layers run inside ``parametrize.cached``). Contenders take turns within every
repeat, so that a drift of the machine's speed touches all of them; a turn is an untimed step and a timed one, as in
training, where the step before was one's own and the allocator has the memory at hand. The table gives medians, and
ratios of the medians over the original. Peak memory is what torch allocates at once during one step beyond what was
there before it.

The original's stride-2 layer of kernel 3 really has one tap; the shape S shows ours with one tap and with nine.
Needs the extra ``peers``.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import itertools
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from espalier.nn import CayleyConv2d
from espalier.nn.kernels import library

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from reference.cayley_original import OriginalCayleyConv
from timings import Row, add_option, record, summary


class Shape(NamedTuple):
    """One layer and its input."""

    inputs: int
    outputs: int
    size: int
    batch: int
    stride: int = 1


SHAPES = {
    "A": Shape(64, 64, 32, 64),
    "B": Shape(128, 128, 16, 64),
    "C": Shape(256, 256, 8, 32),
    "S": Shape(64, 128, 32, 64, 2),
}


def skew_orthogonal(shape: Shape) -> nn.Module:
    """Return orthogonium's SOC, which asks for a GPU and for einops by name, on the CPU."""
    unshuffle = types.SimpleNamespace(rearrange=lambda x, _pattern, k1, k2: F.pixel_unshuffle(x, k1))
    with mock.patch.dict(sys.modules, {} if importlib.util.find_spec("einops") else {"einops": unshuffle}):
        from orthogonium.legacy.skew_ortho_conv import SOC

    plain = torch.randn
    on_cpu = mock.patch("torch.randn", lambda *a, **k: plain(*a, **{**k, "device": "cpu"}))
    with on_cpu, mock.patch("torch.Tensor.cuda", lambda self: self):
        return SOC(shape.inputs, shape.outputs, 3, stride=shape.stride)


def contenders(shape: Shape) -> dict[str, nn.Module]:
    """Return the layers to time, the original first."""
    from orthogonium.layers import AdaptiveOrthoConv2d

    inputs, outputs, size, _, stride = shape
    layers: dict[str, nn.Module] = {"original": OriginalCayleyConv(inputs, outputs, 3, size, stride)}
    if stride == 1:
        layers["espalier"] = CayleyConv2d(inputs, outputs, 3)
    else:
        layers["espalier, one tap"] = CayleyConv2d(inputs, outputs, 1, stride)
        layers["espalier, nine taps"] = CayleyConv2d(inputs, outputs, 3, stride)
    padding = 1 if stride > 1 else "same"
    layers["AOC"] = AdaptiveOrthoConv2d(inputs, outputs, 3, stride=stride, padding=padding)
    layers["SOC"] = skew_orthogonal(shape)
    layers["Conv2d, zeros"] = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
    layers["Conv2d, circular"] = nn.Conv2d(inputs, outputs, 3, stride, padding=1, padding_mode="circular")
    return layers


def train_step(layer: nn.Module, x: Tensor, grad: Tensor) -> None:
    """Run forward and backward."""
    layer(x).backward(grad)
    x.grad = None
    layer.zero_grad()


def evaluate(layer: nn.Module, x: Tensor, _: Tensor) -> None:
    """Run forward alone."""
    with torch.no_grad():
        layer(x)


def seconds(function: Callable[[], object]) -> float:
    """Return how long one call takes: processor time on one thread, which a busy machine disturbs least."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    function()
    return clock() - start


def peak_bytes(function: Callable[[], object]) -> int:
    """Return the most that one call has allocated at any time."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    # The profiler sees torch's allocations alone: no memory of earlier results is taken meanwhile.
    own_memory = mock.patch.object(library, "LARGE", sys.maxsize)
    with own_memory, torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        function()
    results = profile.profiler.kineto_results
    changes = sorted((event for event in results.events() if event.name() == "[memory]"), key=lambda e: e.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in changes))


def measure(shape: Shape, *, training: bool, repeats: int) -> dict[str, Row]:
    """Return the times and the peak memory of every contender."""
    torch.manual_seed(0)
    layers = contenders(shape)
    x = torch.randn(shape.batch, shape.inputs, shape.size, shape.size, requires_grad=training)
    small = shape.size // shape.stride
    grad = torch.randn(shape.batch, shape.outputs, small, small)
    step = train_step if training else evaluate
    calls = {name: functools.partial(step, layer.train(training), x, grad) for name, layer in layers.items()}
    times: dict[str, list[float]] = {name: [] for name in layers}
    with contextlib.nullcontext() if training else parametrize.cached():
        for call in calls.values():
            call()
        peaks = {name: peak_bytes(call) for name, call in calls.items()}
        for _ in range(repeats):
            for name, call in calls.items():
                call()
                times[name].append(seconds(call))
    return {name: summary(taken, peaks[name] / 2**20) for name, taken in times.items()}


def show(title: str, rows: dict[str, Row]) -> None:
    """Print one table."""
    reference = rows["original"]["ms"]
    print(f"\n{title}\n{'':22}{'median ms':>11}{'min ms':>9}{'× faster':>10}{'peak MiB':>10}")
    for name, row in rows.items():
        print(f"{name:22}{row['ms']:11.1f}{row['least']:9.1f}{reference / row['ms']:10.2f}{row['mib']:10.1f}")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="three repeats")
    add_option(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads, float32")
    for name in options.shapes:
        inputs, outputs, size, batch, stride = shape = SHAPES[name]
        words = f"{inputs} → {outputs} channels, {size} × {size}, batch {batch}, stride {stride}"
        for training in (True, False):
            rows = measure(shape, training=training, repeats=3 if options.quick else options.repeats)
            case = f"{name}, {words}, {'training step' if training else 'evaluation'}"
            show(case, rows)
            record(options.record, "cayley", case, rows, threads=options.threads)


if __name__ == "__main__":
    main()
