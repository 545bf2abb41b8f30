"""What does a training step of a certified net cost, by net and by kind of orthogonal convolution?

    python benchmarks/lipschitz_nets.py [--rounds 7] [--threads 1] [--batch 256]

The nets of the recipes ``kwlarge_fashion`` and ``orthogonal_fashion`` on images of 28 × 28, each also with the
convolutions of orthogonium (AOC, SOC) in place of ours. One step is forward, backward and Adam. Nets take turns, so
that a drift of the machine's speed touches all; medians over the rounds, and ratios to the first.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn

from espalier.models import build_model
from espalier.recipes import get_recipe
from espalier.train.losses import multi_margin
from timings import add_option, record, summary

RECIPES = ("kwlarge_fashion", "orthogonal_fashion")
LAYERS = ("cayley", "aoc", "soc")
IMAGE = {"img_size": 28, "in_chans": 1, "num_classes": 10}


def networks() -> dict[str, nn.Module]:
    """Return every net by its name; those whose layers cannot be imported are left out, aloud."""
    nets = {}
    for recipe in map(get_recipe, RECIPES):
        for layer in LAYERS:
            try:
                nets[f"{recipe.name}, {layer}"] = build_model(recipe.model, **recipe.model_args, **IMAGE, layer=layer)
            except ImportError as error:
                print(f"{recipe.name} with {layer} is left out: {error}")
    return nets


def step(net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    """Take one step and return its seconds."""
    start = time.perf_counter()
    optimizer.zero_grad()
    (multi_margin(net(x), y) / len(x)).backward()
    optimizer.step()
    return time.perf_counter() - start


def main() -> None:
    """Print one line a net."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=256)
    add_option(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(options.batch, 1, 28, 28, generator=generator)
    y = torch.randint(10, (options.batch,), generator=generator)
    nets = networks()
    optimizers = {name: torch.optim.Adam(net.parameters()) for name, net in nets.items()}
    times: dict[str, list[float]] = {name: [] for name in nets}
    for turn in range(options.rounds + 1):
        for name, net in nets.items():
            taken = step(net, optimizers[name], x, y)
            if turn:  # the first warms up
                times[name].append(taken)
    print(f"torch {torch.__version__}, {options.threads} threads, batch {options.batch}, n = {options.rounds}")
    rows = {name: summary(samples) for name, samples in times.items()}
    base = next(iter(rows.values()))["ms"]
    for name, row in rows.items():
        print(f"  {name:<28}{row['ms']:8.0f} ms ({row['least']:.0f}…{row['most']:.0f}) {row['ms'] / base:6.2f}×")
    case = f"training step, batch {options.batch}"
    record(options.record, "lipschitz_nets", case, rows, threads=options.threads)


if __name__ == "__main__":
    main()
