"""The arms that settle what the closed form of filter covariances leaves open: one departure from the default each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The defaults that these depart from: σ a variance, distances around a torus, mask by the first pixel, negative
# eigenvalues clipped, raw scale, the schedule of patch 2, depth from the first layer to the last.
FILTER_SWITCHES: dict[str, Mapping[str, Any]] = {
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
"""Arguments of ``FilterCovariance`` by the name of their arm."""


SWITCH_ARMS: dict[str, Mapping[str, Any]] = {
    f"covariance-{name}{suffix}": {"init": "covariance", "init_args": dict(switches), "freeze": freeze}
    for name, switches in FILTER_SWITCHES.items()
    for suffix, freeze in (("", ""), ("-frozen", "depthwise"))
}
"""Every switch with trained and with frozen filters."""

TRANSFER_ARMS: dict[str, Mapping[str, Any]] = {
    # The statistics stay those of the recipe: --init STATISTICS.safetensors.
    "transferred": {"init": "transferred", "freeze": ""},
    "transferred-frozen": {"init": "transferred", "freeze": "depthwise"},
}
"""Filters of another network's statistics, trained and frozen."""
