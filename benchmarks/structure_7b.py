"""How long does ``structure_`` take on the attention of a 7B-parameter model, and how much memory does one layer need?

    python benchmarks/structure_7b.py [--layers 2] [--dim 4096] [--heads 32]

A few layers are measured, verification included, and the time is multiplied up to 32 layers and said so (the work is
the same for each). The memory is the growth of the process's peak while the layers are written. The diagonals and the
captured energy of the last layer's products are then held against what the best approximation of their targets has.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch
from torch import nn

import espalier
from espalier.init.attention.mimetic import expected_diagonal

ALL_LAYERS = 32


def peak_mib() -> float:
    """Return the largest resident size of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Print the times, the memory and the products."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=32)
    options = parser.parse_args()
    layers = nn.ModuleList(nn.MultiheadAttention(options.dim, options.heads, bias=False) for _ in range(options.layers))
    before = peak_mib()
    times, processor = [], time.process_time()
    for index, layer in enumerate(layers):
        start = time.perf_counter()
        [row] = espalier.structure_(layer, generator=torch.Generator().manual_seed(index)).layers
        times.append(time.perf_counter() - start)
    grown, processor = peak_mib() - before, time.process_time() - processor
    mean = sum(times) / len(times)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, d = {options.dim}, {options.heads} heads")
    print(f"one layer: {', '.join(f'{t:.1f}' for t in times)} s (measured), peak memory grew by {grown:.0f} MiB")
    # On a busy machine the processor's time says more than the clock's.
    each = processor / len(times)
    print(f"processor time of one layer, all threads: {each:.1f} s")
    print(
        f"{ALL_LAYERS} layers: {mean * ALL_LAYERS / 60:.1f} min, {each * ALL_LAYERS / 60:.1f} min of processor time "
        f"(extrapolated from {len(times)})"
    )
    asked = expected_diagonal(0.7, 0.7, 1 / options.heads), -0.4
    for name, wanted in zip(("qk", "vo"), asked, strict=True):
        found = row.measured[f"{name}_diagonal"]
        print(f"{name} diagonal: {found:.4f}, law {wanted:.4f}, off by {abs(found / wanted - 1):.1%}")
    # Diagonal and energy together: the strengths that a product with these must have been asked for.
    [fitted] = espalier.init.fit(layer).rows["attention"]
    for name, strengths, wanted in (("qk", fitted.qk_asked, (0.7, 0.7)), ("vo", fitted.vo_asked, (0.4, -0.4))):
        print(
            f"{name} strengths behind its diagonal and energy: {strengths[0]:.3f}, {strengths[1]:.3f}, asked {wanted}"
        )


if __name__ == "__main__":
    main()
