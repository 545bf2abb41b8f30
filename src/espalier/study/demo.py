"""The studies of ``espalier demo``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from espalier.recipes import Recipe, get_recipe


@dataclass(frozen=True)
class Plan:
    """One question and the trials that answer it; the first arm is the baseline."""

    name: str
    """Name of the study's folder."""
    title: str
    recipe: Recipe
    arms: Sequence[str]
    lrs: Sequence[float]
    seeds: Sequence[int] = (0, 1, 2)


def demo_plans(*, smallest: bool = False) -> list[Plan]:
    """Return the studies of ``espalier demo``.

    The settings were chosen so that a difference would be seen if there is one (few epochs, a net that the data does
    not saturate at once), before any arm was looked at; every arm gets the same rates and the same seeds. The third is
    an exception: that its setting separates the arms was known from trials.

    Args:
        smallest: one seed, one rate and one epoch each: everything runs, nothing is shown.
    """
    mixing, copying = get_recipe("digits_convmixer"), get_recipe("copy_mamba1")
    short = {**copying.data_args, "length": 12, "vocab_size": 12, "eval_examples": 64}
    plans = [
        Plan(
            name="digits_vit",
            title="Attention on digits: default against mimetic",
            recipe=get_recipe("digits_vit"),
            arms=("default", "mimetic"),
            lrs=(1e-3, 3e-3, 1e-2),
        ),
        Plan(
            name="digits_convmixer",
            title="Depthwise filters on digits: default against covariance, trained and frozen",
            # Few images and a narrow net: with all of them every arm is at its ceiling.
            recipe=replace(
                mixing, data_args={"train_limit": 400}, batch_size=32, model_args={**mixing.model_args, "dim": 24}
            ),
            arms=("default", "covariance", "default-frozen", "covariance-frozen"),
            lrs=(3e-3, 1e-2, 3e-2),
        ),
        Plan(
            name="copy_mamba1",
            title="State-space layers on copying: default against mimetic",
            recipe=replace(copying, data_args=short, batch_size=32, epochs=5, eval_every=1),
            arms=("default", "mimetic-ssm"),
            lrs=(6e-3,),
        ),
    ]
    return [_smallest(plan) for plan in plans] if smallest else plans


def _smallest(plan: Plan) -> Plan:
    data_args = dict(plan.recipe.data_args)
    if "steps_per_epoch" in data_args:
        data_args |= {"steps_per_epoch": 5, "eval_examples": 8}
    recipe = replace(plan.recipe, epochs=1, data_args=data_args)
    return replace(plan, recipe=recipe, lrs=plan.lrs[:1], seeds=plan.seeds[:1])
