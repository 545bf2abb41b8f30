"""The arms of a comparison: each is a named change of a few recipe fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from espalier.errors import unknown_name
from espalier.lookup import is_reference
from espalier.recipes.base import Recipe

ARMS: dict[str, Mapping[str, Any]] = {
    "default": {"init": "default", "init_args": {}, "freeze": ""},
    "default-frozen": {"init": "default", "init_args": {}, "freeze": "depthwise"},
    "mimetic": {"init": "mimetic", "init_args": {}, "freeze": ""},
    "covariance": {"init": "covariance", "init_args": {}, "freeze": ""},
    "covariance-frozen": {"init": "covariance", "init_args": {}, "freeze": "depthwise"},
    "mimetic-ssm": {"init": "mimetic_ssm", "init_args": {}, "freeze": ""},
    "mimetic-ssm-scaled": {"init": "mimetic_ssm", "init_args": {"decay_rule": "scaled"}, "freeze": ""},
    "mimetic-ssm-gain": {"init": "mimetic_ssm", "init_args": {"gain": 1.0}, "freeze": ""},
    "mimetic-ssm-one": {"init": "mimetic_ssm", "init_args": {"layers": 0}, "freeze": ""},
    "ssm-covariance": {
        "init": "mimetic_ssm",
        "init_args": {"decay": None, "delta": None, "correlate": None, "convolution": "covariance"},
        "freeze": "",
    },
    "mimetic-ssm-last": {"init": "mimetic_ssm", "init_args": {"layers": -1}, "freeze": ""},
    "structured": {"init": "structured", "init_args": {}, "freeze": ""},
    "truncated-normal": {"init": "truncated_normal", "init_args": {}, "freeze": ""},
    "uniform-values": {"init": "uniform_values", "init_args": {}, "freeze": ""},
    "zero-output": {"init": "zero_output", "init_args": {}, "freeze": ""},
    "identity-vo": {"init": "mimetic", "init_args": {"preset": "language"}, "freeze": ""},
    "semi-orthogonal": {"init": "semi_orthogonal", "init_args": {}, "freeze": ""},
    "impulse": {"init": "impulse", "init_args": {}, "freeze": ""},
    "mlp-mean-shift": {"init": "mlp_mean_shift", "init_args": {}, "freeze": ""},
    # The statistics stay those of the recipe: --init STATISTICS.safetensors.
    "transferred": {"init": "transferred", "freeze": ""},
    "transferred-frozen": {"init": "transferred", "freeze": "depthwise"},
}


def apply_arm(recipe: Recipe, arm: str) -> Recipe:
    """Return ``recipe`` with the fields of ``arm`` changed; an initialisation of your own, ``FILE.py:NAME``, is an arm.

    Raises:
        EspalierError: no arm has that name; the message suggests the closest ones.
    """
    if is_reference(arm):
        return replace(recipe, init=arm, init_args={}, freeze="")
    if arm not in ARMS:
        raise unknown_name("arm", arm, ARMS)
    return replace(recipe, **ARMS[arm])
