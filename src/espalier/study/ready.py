"""Ready-made studies: which recipes, arms, rates and seeds answer which question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from espalier.recipes import Recipe, get_recipe


@dataclass(frozen=True)
class Plan:
    """One question and the trials that answer it; the first arm is the baseline."""

    title: str
    recipe: Recipe
    arms: Sequence[str]
    lrs: Sequence[float]
    seeds: Sequence[int]


def demo_plans(*, smallest: bool = False) -> list[Plan]:
    """Return the studies of ``espalier demo``.

    The settings were chosen so that a difference would be seen if there is one (few epochs, a net that the data does
    not saturate at once), before any arm was looked at; every arm gets the same rates and the same seeds.

    Args:
        smallest: one seed, one rate and one epoch each: everything runs, nothing is shown.
    """
    plans = [
        Plan(
            title="Attention on digits: default against mimetic",
            recipe=get_recipe("digits_vit"),
            arms=("default", "mimetic"),
            lrs=(1e-3, 3e-3, 1e-2),
            seeds=(0, 1, 2),
        ),
        Plan(
            title="Depthwise filters on digits: default against covariance, trained and frozen",
            recipe=get_recipe("digits_convmixer"),
            arms=("default", "covariance", "default-frozen", "covariance-frozen"),
            lrs=(3e-3, 1e-2, 3e-2),
            seeds=(0, 1, 2),
        ),
    ]
    return [_smallest(plan) for plan in plans] if smallest else plans


def _smallest(plan: Plan) -> Plan:
    return replace(plan, recipe=replace(plan.recipe, epochs=1), lrs=plan.lrs[:1], seeds=plan.seeds[:1])
