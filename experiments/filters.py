"""Filters: what the closed form of filter covariances is worth (docs/results/filters.md).

    python experiments/queue.py --only filters-kernel9-patch2 --deadline 1h        # needs ESPALIER_DATA with cifar-10

A ConvMixer-48/4 or a small ConvNeXt sees 2,000 CIFAR-10 images for 8 epochs: about a minute of one core a trial.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from espalier.recipes import Recipe, get_recipe
from experiments.experiment import Experiment
from experiments.trained_filters import SOURCE

ARMS = ("default", "covariance", "default-frozen", "covariance-frozen")
# S3.3 asks the first two, S3.4 the last.
PAIRS = (("covariance", "default"), ("covariance-frozen", "default-frozen"), ("covariance-frozen", "default"))
RATES = (1e-2, 3e-2, 1e-1)

# The defaults that these depart from: σ a variance, distances around a torus, mask by the first pixel, negative
# eigenvalues clipped, raw scale, the schedule of patch 2, depth from the first layer to the last.
SWITCHES: Mapping[str, Mapping[str, Any]] = {
    "std": {"sigma_is_std": True},
    "unwrapped": {"wrap": False},
    "mask-y": {"mask": "y"},
    "abs": {"variant": "abs"},
    "psd": {"variant": "psd"},
    "unit": {"scale": "unit"},
    "match-default": {"scale": "match_default"},
    "patch-1": {"preset": "patch-1"},
    "convnext": {"preset": "convnext"},
    "starts": {"depth_rule": "starts"},
    "middles": {"depth_rule": "middles"},
    "stops": {"depth_rule": "stops"},
}
"""Arguments of ``FilterCovariance`` by what they depart from."""


def switch_arms(freeze: str) -> dict[str, Mapping[str, Any]]:
    """Return the closed form, each departure from it, and torch's own filters: none can be right that does not beat
    them."""
    arms: dict[str, Mapping[str, Any]] = {"covariance": {"init": "covariance", "freeze": freeze}}
    for name, arguments in SWITCHES.items():
        arms[f"covariance-{name}"] = {"init": "covariance", "init_args": arguments, "freeze": freeze}
    return arms | {"default": {"freeze": freeze}}


def convmixer(kernel: int, patch: int) -> Recipe:
    """Return the recipe ``convmixer_filters`` with another kernel and patch."""
    base = get_recipe("convmixer_filters")
    return replace(base, model_args={**base.model_args, "kernel_size": kernel, "patch_size": patch})


def convnext_arms() -> dict[str, Mapping[str, Any]]:
    """Return the arms of a ConvNeXt: the closed form has a preset for it."""
    form = {"init": "covariance", "init_args": {"preset": "convnext"}}
    return {
        "default": {},
        "covariance": form,
        "default-frozen": {"freeze": "depthwise"},
        "covariance-frozen": {**form, "freeze": "depthwise"},
    }


WORTH = [
    Experiment(
        f"filters-kernel{kernel}-patch{patch}",
        f"Depthwise filters, ConvMixer-48/4, kernel {kernel}, patch {patch}: torch's and the closed form's",
        convmixer(kernel, patch),
        ARMS,
        RATES,
        seeds=5,
        minutes=minutes,
        pairs=PAIRS,
    )
    for kernel, patch, minutes in ((9, 2, 1.2), (5, 2, 0.8), (9, 4, 0.5), (5, 4, 0.4))
]
CONVNEXT = Experiment(
    "filters-convnext",
    "Depthwise filters, a small ConvNeXt: torch's and the closed form's",
    get_recipe("convnext_filters"),
    convnext_arms(),
    (1e-3, 3e-3, 1e-2),
    seeds=5,
    minutes=0.8,
    pairs=PAIRS,
)
# What a source of kernel 9, patch 2, width 48 and 4 layers is carried over to.
_TARGETS: Mapping[str, Mapping[str, Any]] = {
    "depth8": {"depth": 8},
    "width96": {"dim": 96},
    "patch4": {"patch_size": 4},
    "kernel5": {"kernel_size": 5},
}
TRANSFER = [
    Experiment(
        f"filters-transfer-{name}",
        f"Covariances of trained filters (ConvMixer-48/4, kernel 9, patch 2) carried over to {name}",
        replace(convmixer(9, 2), model_args={**convmixer(9, 2).model_args, **changes}),
        {
            "default": {},
            "covariance": {"init": "covariance"},
            "transferred": {"init": "transferred", "init_args": {"statistics": SOURCE.as_posix()}},
        },
        (1e-2, 3e-2),
        seeds=3,
        minutes=minutes,
        pairs=(("transferred", "default"), ("transferred", "covariance")),
    )
    for (name, changes), minutes in zip(_TARGETS.items(), (1.8, 2.2, 0.5, 0.8), strict=True)
]
SWITCHED = [
    Experiment(
        f"filters-switches-{words}",
        f"Departures from the closed form, ConvMixer-48/4, kernel 9, patch 2, filters {words}",
        convmixer(9, 2),
        switch_arms(freeze),
        (1e-2, 3e-2),
        seeds=3,
        minutes=1.2,
        extend=False,
    )
    for words, freeze in (("frozen", "depthwise"), ("trained", ""))
]
