"""The arms of a comparison: each is a named change of a few recipe fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from espalier.errors import unknown_name
from espalier.recipes.arms_filters import FILTER_ARMS
from espalier.recipes.base import Recipe

ARMS: dict[str, Mapping[str, Any]] = {
    "default": {"init": "default", "init_args": {}, "freeze": ""},
    "default-frozen": {"init": "default", "init_args": {}, "freeze": "depthwise"},
    "mimetic": {"init": "mimetic", "init_args": {}, "freeze": ""},
    "covariance": {"init": "covariance", "init_args": {}, "freeze": ""},
    "covariance-frozen": {"init": "covariance", "init_args": {}, "freeze": "depthwise"},
    "structured": {"init": "structured", "init_args": {}, "freeze": ""},
    **FILTER_ARMS,
}


def apply_arm(recipe: Recipe, arm: str) -> Recipe:
    """Return ``recipe`` with the fields of ``arm`` changed.

    Raises:
        EspalierError: no arm has that name; the message suggests the closest ones.
    """
    if arm not in ARMS:
        raise unknown_name("arm", arm, ARMS)
    return replace(recipe, **ARMS[arm])
