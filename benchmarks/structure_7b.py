"""How long does ``structure_`` take on a model of 7B parameters, and how much memory does one layer need?

    python benchmarks/structure_7b.py [--layers 2] [--dim 4096] [--heads 32] [--threads 2]

A few layers of each kind are measured, verification included, and the time is multiplied up to 32 layers and said so.
The first attention layer also makes the decomposition that the others turn (Note [Turned copies] in
``espalier.init.attention.near_identity``), so it is shown apart and counted once. The hybrid has 32 attention layers,
32 Mamba-2 mixers and 32 depthwise convolutions. Memory is the growth of the process's peak while the layers are
written. The diagonals and the captured energy of the last attention layer's products are then held against what the
best approximation of their targets has.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

import espalier
from espalier.init.attention.mimetic import truncated
from timings import add_option, record, summary

ALL_LAYERS = 32


class Cost(NamedTuple):
    """Seconds by the clock and of the processor (all threads): of the first layer, and the mean of the others."""

    first: tuple[float, float]
    other: tuple[float, float]

    def all(self) -> tuple[float, float]:
        """Return what 32 layers cost."""
        clock, processor = (a + (ALL_LAYERS - 1) * b for a, b in zip(self.first, self.other, strict=True))
        return clock, processor


def peak_mib() -> float:
    """Return the largest resident size of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name: str, build: Callable[[], nn.Module], count: int) -> tuple[Cost, nn.Module]:
    """Write ``count`` ≥ 2 layers, print what they cost, and return that and the last one."""
    costs = []
    for index in range(count):
        layer = build()
        before, start, processor = peak_mib(), time.perf_counter(), time.process_time()
        espalier.structure_(layer, generator=torch.Generator().manual_seed(index))
        costs.append((time.perf_counter() - start, time.process_time() - processor))
        print(f"{name} {index}: {costs[-1][0]:.2f} s, processor {costs[-1][1]:.2f} s, "
              f"peak memory grew by {peak_mib() - before:.0f} MiB")  # fmt: skip
    clock, processor = (sum(part) / (count - 1) for part in zip(*costs[1:], strict=True))
    return Cost(costs[0], (clock, processor)), layer


def main() -> None:
    """Print the times, the memory and the products."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    add_option(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dim, heads, layers = options.dim, options.heads, max(options.layers, 2)
    print(f"torch {torch.__version__}, {options.threads} threads, d = {dim}, {heads} heads")
    attention, last = measure("attention", lambda: nn.MultiheadAttention(dim, heads, bias=False), layers)
    mixers = measure("Mamba-2", lambda: espalier.nn.Mamba2(dim, 128), layers)[0]
    filters = measure("depthwise", lambda: nn.Conv2d(dim, dim, 7, padding=3, groups=dim), layers)[0]
    rows = {}
    # On a busy machine the processor's time says more than the clock's.
    for name, parts in (("attention", [attention]), ("hybrid", [attention, mixers, filters])):
        clock, processor = (sum(part) / 60 for part in zip(*(cost.all() for cost in parts), strict=True))
        print(
            f"{name}, {ALL_LAYERS} layers of each kind: {clock:.1f} min, {processor:.1f} min of processor time "
            f"(extrapolated from {layers})"
        )
        rows[f"{name}, {ALL_LAYERS} layers of each kind, multiplied up"] = summary([60 * clock], peak_mib())
    record(options.record, "structure_7b", f"width {dim}, {heads} heads", rows, threads=options.threads)
    row = espalier.audit(last).layers[0]
    asked = truncated(0.7, 0.7, 1 / heads)[1], -0.4
    for name, wanted in zip(("qk", "vo"), asked, strict=True):
        found = row.measured[f"{name}_diagonal"]
        print(f"{name} diagonal: {found:.4f}, expected {wanted:.4f}, off by {abs(found / wanted - 1):.1%}")
    # Diagonal and energy together: the strengths that a product with these must have been asked for.
    [fitted] = espalier.init.fit(last).rows["attention"]
    for name, strengths, wanted in (("qk", fitted.qk_asked, (0.7, 0.7)), ("vo", fitted.vo_asked, (0.4, -0.4))):
        print(
            f"{name} strengths behind its diagonal and energy: {strengths[0]:.3f}, {strengths[1]:.3f}, asked {wanted}"
        )


if __name__ == "__main__":
    main()
