"""How much faster is ``structure_`` on a ViT-L than one full SVD a head?

    python benchmarks/structure_vit_large.py [--layers 24] [--obvious-heads 4]

The obvious way decomposes a full d × d matrix for every head and for every value-output pair. It is timed on a few
heads of one layer and multiplied by the number of heads and layers (the work is the same for each); ours is timed
whole, its verification included.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

import espalier
from timings import add_option, record, summary

DIM, HEADS = 1024, 16


def seconds(function: Callable[[], object]) -> float:
    """Return how long one call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def obvious_head(rank: int, alpha: float, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Split one near-identity matrix by a full SVD, as the widely copied snippet does."""
    matrix = alpha * torch.randn(DIM, DIM) / DIM**0.5 + beta * torch.eye(DIM)
    u, s, vh = torch.linalg.svd(matrix)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, vh[:rank].T * root


def main() -> None:
    """Print both times and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--obvious-heads", type=int, default=4)
    add_option(parser)
    options = parser.parse_args()
    layers = nn.ModuleList(nn.MultiheadAttention(DIM, HEADS) for _ in range(options.layers))
    obvious_head(DIM // HEADS, 0.7, 0.7)  # warm-up
    samples = []
    ours = 0.0
    # The two ways alternate, so that a drift of the machine's speed touches both.
    for start in range(0, options.layers, 6):
        samples += [seconds(lambda: obvious_head(DIM // HEADS, 0.7, 0.7)) for _ in range(options.obvious_heads)]
        part = layers[start : start + 6]
        ours += seconds(lambda part=part: espalier.structure_(part, generator=torch.Generator().manual_seed(0)))
    one = statistics.median(samples)
    obvious = one * (HEADS + 1) * options.layers
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, d = {DIM}, {HEADS} heads")
    print(f"one full SVD: median {one * 1e3:.0f} ms of {len(samples)} ({min(samples):.3f}…{max(samples):.3f} s)")
    print(f"obvious way, {options.layers} layers × {HEADS + 1} SVDs: {obvious:.1f} s (extrapolated)")
    print(f"structure_ with verification, {options.layers} layers: {ours:.1f} s (measured)")
    print(f"ratio: {obvious / ours:.1f}×")
    rows = {"espalier, verified": summary([ours]), "full SVDs, multiplied up": summary([obvious])}
    case = f"{options.layers} layers of width {DIM}, {HEADS} heads"
    record(options.record, "structure_vit_large", case, rows, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
