"""What a ready-made study is: one question and the trials that answer it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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


def smallest_plan(plan: Plan) -> Plan:
    """Return the plan with one seed, one rate and one epoch: everything runs, nothing is shown."""
    data_args = dict(plan.recipe.data_args)
    if "steps_per_epoch" in data_args:
        data_args |= {"steps_per_epoch": 5, "eval_examples": 8}
    recipe = replace(plan.recipe, epochs=1, data_args=data_args)
    return replace(plan, recipe=recipe, lrs=plan.lrs[:1], seeds=plan.seeds[:1])
