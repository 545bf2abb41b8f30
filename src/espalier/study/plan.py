"""What a ready-made study is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from espalier.recipes import Recipe

Scale = Literal["cpu", "gpu"]
SCALES = ("cpu", "gpu")
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Plan:
    """One question and the trials that answer it; the first arm is the baseline."""

    name: str
    """Name of the study's folder."""
    title: str
    recipe: Recipe
    arms: Sequence[str]
    lrs: Sequence[float]
    seeds: Sequence[int] = SEEDS
