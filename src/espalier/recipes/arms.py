"""The arms of a comparison: each is a named change of a few recipe fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from espalier.errors import require_known
from espalier.lookup import is_reference
from espalier.recipes.base import Recipe
from espalier.recipes.inits import INITS


def _arm(init: str, freeze: str = "", **init_args: Any) -> dict[str, Any]:
    return {"init": init, "init_args": init_args, "freeze": freeze}


# Every initialisation is an arm, and these are more.
ARMS: dict[str, Mapping[str, Any]] = {
    **{name.replace("_", "-"): _arm(name) for name in INITS},
    "default-frozen": _arm("default", freeze="depthwise"),
    "covariance-frozen": _arm("covariance", freeze="depthwise"),
    "mimetic-ssm-scaled": _arm("mimetic_ssm", decay_rule="scaled"),
    "mimetic-ssm-gain": _arm("mimetic_ssm", gain=1.0),
    "mimetic-ssm-one": _arm("mimetic_ssm", layers=0),
    "mimetic-ssm-last": _arm("mimetic_ssm", layers=-1),
    "ssm-covariance": _arm("mimetic_ssm", decay=None, delta=None, correlate=None, convolution="covariance"),
    "identity-vo": _arm("mimetic", preset="language"),
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
