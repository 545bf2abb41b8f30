"""The arms of a comparison: each is a named change of a few recipe fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from espalier.errors import require_known
from espalier.lookup import is_reference
from espalier.recipes.base import Recipe


def _arm(init: str, freeze: str = "", **init_args: Any) -> dict[str, Any]:
    return {"init": init, "init_args": init_args, "freeze": freeze}


ARMS: dict[str, Mapping[str, Any]] = {
    "default": _arm("default"),
    "default-frozen": _arm("default", freeze="depthwise"),
    "mimetic": _arm("mimetic"),
    "covariance": _arm("covariance"),
    "covariance-frozen": _arm("covariance", freeze="depthwise"),
    "mimetic-ssm": _arm("mimetic_ssm"),
    "mimetic-ssm-scaled": _arm("mimetic_ssm", decay_rule="scaled"),
    "mimetic-ssm-gain": _arm("mimetic_ssm", gain=1.0),
    "mimetic-ssm-one": _arm("mimetic_ssm", layers=0),
    "ssm-covariance": _arm("mimetic_ssm", decay=None, delta=None, correlate=None, convolution="covariance"),
    "mimetic-ssm-last": _arm("mimetic_ssm", layers=-1),
    "structured": _arm("structured"),
    "truncated-normal": _arm("truncated_normal"),
    "uniform-values": _arm("uniform_values"),
    "zero-output": _arm("zero_output"),
    "identity-vo": _arm("mimetic", preset="language"),
    "semi-orthogonal": _arm("semi_orthogonal"),
    "impulse": _arm("impulse"),
    "mlp-mean-shift": _arm("mlp_mean_shift"),
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
        return replace(recipe, **_arm(arm))
    require_known("arm", arm, ARMS)
    return replace(recipe, **ARMS[arm])
