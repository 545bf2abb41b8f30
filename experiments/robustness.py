"""Robustness: certified accuracy of nets of orthogonal layers (docs/results/robustness.md).

    python experiments/queue.py --only robustness-fashion-epochs --deadline 2h     # needs ESPALIER_DATA

One patch net (``orthogonal_fashion``) with four kinds of orthogonal convolution, each with its own best rate, on all of
Fashion-MNIST: one to three minutes of one core a trial; the kinds also on CIFAR-10. A run's score is its clean
accuracy; what is compared, and what chooses the rates, is the certified accuracy at 36/255 among the extra figures of
its record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from espalier.certify import certify
from espalier.recipes import Recipe, get_recipe
from espalier.recipes.robust import TEMPERED
from espalier.train import Run
from espalier.train.certify_runs import pixel_net
from experiments.experiment import Experiment

RADII = {"36/255": 36 / 255, "72/255": 72 / 255, "108/255": 108 / 255}
METRIC = "36/255 certified accuracy"
BASE = replace(get_recipe("orthogonal_fashion"), epochs=5, eval_every=5, threads=1)


def certified_accuracies(run: Run) -> Mapping[str, float]:
    """Return the certified accuracy at the three radii, over all test images, and what mirror images add to it."""
    net, images, labels = pixel_net(run)
    certificate = certify(net, images, labels)
    figures = {f"{name} certified accuracy": certificate.certified_accuracy(radius) for name, radius in RADII.items()}
    averaging = [module for module in net.modules() if getattr(module, "flip_average", False)]
    if averaging:
        for module in averaging:
            module.flip_average = False
        figures["36/255 without mirror images"] = certify(net, images, labels).certified_accuracy(RADII["36/255"])
    return figures


def layer_arms(epochs: Mapping[str, int]) -> dict[str, Mapping[str, Any]]:
    """Return one arm a kind of convolution, each with its number of epochs."""
    return {
        layer: {"model_args": {**BASE.model_args, "layer": layer}, "epochs": count, "eval_every": count}
        for layer, count in epochs.items()
    }


CERTIFIED = partial(Experiment, measure=certified_accuracies, metric=METRIC)
EQUAL_EPOCHS = CERTIFIED(
    "robustness-fashion-epochs",
    "Certified nets on Fashion-MNIST at equal epochs: Cayley, AOC, SOC",
    BASE,
    layer_arms({"cayley": 5, "aoc": 5, "soc": 5}),
    (1e-3, 3e-3, 1e-2),
    seeds=3,
    minutes=2.0,
    pairs=(("cayley", "aoc"), ("cayley", "soc")),
)
EQUAL_TIME = CERTIFIED(
    "robustness-fashion-time",
    "Certified nets on Fashion-MNIST at equal time (a step of AOC takes 1.35, of SOC 2.7 times as long)",
    BASE,
    # From benchmarks/lipschitz_nets.py: 35, 47 and 93 ms a step.
    layer_arms({"cayley": 8, "aoc": 6, "soc": 3}),
    (1e-3, 3e-3, 1e-2),
    seeds=3,
    minutes=2.5,
    pairs=(("cayley", "aoc"), ("cayley", "soc")),
)


def minutes_arms(nets: Mapping[str, Recipe], epochs: Mapping[str, Mapping[int, int]]) -> dict[str, Mapping[str, Any]]:
    """Return one arm for each net and number of minutes, each with its number of epochs."""
    return {
        f"{name}-{minutes}min": {
            "model": nets[name].model, "model_args": nets[name].model_args, "epochs": count, "eval_every": count
        }
        for name, counts in epochs.items()
        for minutes, count in counts.items()
    }  # fmt: skip


def minutes_experiment(
    dataset: str, patch_net: Recipe, kwlarge: Recipe, epochs: Mapping[str, Mapping[int, int]]
) -> Experiment:
    """Return our patch net and KWLarge after 1 and 10 minutes of one core, the rates swept."""
    return CERTIFIED(
        f"robustness-{dataset}-minutes",
        f"Certified accuracy on {NAMES[dataset]} after 1 and 10 minutes of one core: our patch net and KWLarge",
        replace(patch_net, threads=1),
        minutes_arms({"patch-net": patch_net, "kwlarge": kwlarge}, epochs),
        (3e-3, 1e-2),
        seeds=3,
        minutes=6.0,
        pairs=(("patch-net-1min", "kwlarge-1min"), ("patch-net-10min", "kwlarge-10min")),
    )


NAMES = {"fashion": "Fashion-MNIST", "cifar10": "CIFAR-10"}
_CIFAR10 = get_recipe("orthogonal_cifar10")
MINUTES = {
    # 235 steps an epoch of 35 and 109 ms (benchmarks/lipschitz_nets.py).
    "fashion": minutes_experiment(
        "fashion", BASE, get_recipe("kwlarge_fashion_tempered"),
        {"patch-net": {1: 7, 10: 73}, "kwlarge": {1: 2, 10: 23}},
    ),
    # 195 steps an epoch of 120 to 144 and 400 ms.
    "cifar10": minutes_experiment(
        "cifar10", _CIFAR10, replace(get_recipe("kwlarge_cifar10"), **TEMPERED),
        {"patch-net": {1: 2, 10: 21}, "kwlarge": {1: 1, 10: 8}},
    ),
}  # fmt: skip
LAYERS_CIFAR10 = CERTIFIED(
    "robustness-cifar10-layers",
    "Certified nets on CIFAR-10 at equal epochs and at equal time: Cayley, AOC, SOC, at the rates found on "
    "Fashion-MNIST",
    replace(_CIFAR10, threads=1),
    {
        f"{layer}-{count}": {
            "model_args": {**_CIFAR10.model_args, "layer": layer}, "epochs": count, "eval_every": count
        }
        # 130, 192 and 472 ms a step (one core of an AMD EPYC): cayley-6 takes as long as aoc-4, cayley-7 as soc-2.
        for layer, count in (("cayley", 4), ("aoc", 4), ("soc", 4), ("cayley", 6), ("cayley", 7), ("soc", 2))
    },
    (3e-3, 1e-2),
    seeds=3,
    minutes=3.2,
    pairs=(("cayley-4", "aoc-4"), ("cayley-4", "soc-4"), ("cayley-6", "aoc-4"), ("cayley-7", "soc-2")),
)  # fmt: skip


def hour_experiment(dataset: str, patch_net: Recipe, epochs: int, lr: float) -> Experiment:
    """Return our patch net after an hour of one core at the rate that fewer minutes found."""
    return CERTIFIED(
        f"robustness-{dataset}-hour",
        f"Certified accuracy on {NAMES[dataset]} after 60 minutes of one core: our patch net at the rate found",
        replace(patch_net, threads=1),
        minutes_arms({"patch-net": patch_net}, {"patch-net": {60: epochs}}),
        (lr,),
        seeds=3,
        minutes=60.0,
        extend=False,
    )


HOURS = {
    # Twice the recipe's batch, as the transforms cost the same for any, and its rate times √2: 97 steps an epoch of
    # 220 ms, with other programs on the machine.
    "cifar10": hour_experiment(
        "cifar10",
        replace(_CIFAR10, batch_size=512, model_args={**_CIFAR10.model_args, "flip_average": True}),
        160,
        1.4e-2,
    ),
    # Six times the epochs of ten minutes.
    "fashion": hour_experiment("fashion", BASE, 438, 3e-3),
}
SCALE = CERTIFIED(
    "robustness-fashion-scale",
    "Certified nets on Fashion-MNIST by width and depth, at equal epochs",
    BASE,
    {
        f"width{width}-depth{depth}": {
            "model_args": {**BASE.model_args, "widths": (width,), "depths": (depth,), "hidden": 8 * width}
        }
        for width, depth in ((16, 2), (32, 2), (64, 2), (32, 1), (32, 4))
    },
    (3e-3, 1e-2),
    seeds=3,
    minutes=2.0,
    pairs=(("width64-depth2", "width16-depth2"), ("width32-depth4", "width32-depth1")),
)
