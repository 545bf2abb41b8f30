"""Ready-made studies: which recipes, arms, rates and seeds answer which question."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from espalier.errors import unknown_name
from espalier.recipes import Recipe, get_recipe
from espalier.recipes.arms import ssm_part_arms
from espalier.study.plan import SCALES, Plan, Scale, smallest_plan
from espalier.study.ready_filters import FILTER_STUDIES

# A factor of 100 in eight steps, for every arm: a default Mamba is known to need the right rate (arXiv 2508.19029).
EIGHT_RATES = (1e-4, 2e-4, 4e-4, 8e-4, 1.5e-3, 3e-3, 6e-3, 1e-2)
STATE_SIZES: Mapping[str, Sequence[int]] = {"cpu": (8, 16, 32, 64, 128), "gpu": (16, 32, 64, 128, 256, 512)}


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
    return [smallest_plan(plan) for plan in plans] if smallest else plans


def ready_plans(name: str, scale: Scale = "cpu") -> list[Plan]:
    """Return the plans of the ready-made study called ``name``.

    Args:
        name: a key of ``READY``.
        scale: ``"cpu"`` (minutes on two cores) or ``"gpu"`` (strings of 50 symbols, wider states, longer training).

    Raises:
        EspalierError: an unknown name or scale.
    """
    if name not in READY:
        raise unknown_name("study", name, READY)
    if scale not in SCALES:
        raise unknown_name("scale", scale, SCALES)
    return READY[name](scale)


def lr_window(scale: Scale) -> list[Plan]:
    """Return the sweep that measures how wide the window of learning rates is, and whether the start widens it."""
    names = ("copy_mamba1",) if scale == "cpu" else ("copy_mamba1", "copy_mamba2")
    return [
        Plan(
            name=name,
            title=f"Learning-rate window: {name}, default against mimetic-ssm",
            recipe=_copying(name, scale),
            arms=("default", "mimetic-ssm"),
            lrs=EIGHT_RATES,
        )
        for name in names
    ]


def which_part(scale: Scale) -> list[Plan]:
    """Return the ablation over all 16 combinations of the four parts; ``default`` is the one that writes none."""
    return [
        Plan(
            name="copy_mamba1",
            title="Which part matters: decay, delta, correlate, convolution in all combinations",
            recipe=_copying("copy_mamba1", scale),
            arms=("default", *ssm_part_arms()),
            lrs=(4e-3, 1e-2) if scale == "cpu" else (1e-3, 4e-3, 1e-2),
        )
    ]


def state_capacity(scale: Scale) -> list[Plan]:
    """Return one plan a state size; ``espalier.study.capacity`` measures how long the strings may be."""
    recipe = _copying("copy_mamba2", scale)
    return [
        Plan(
            name=f"state={size}",
            title=f"State capacity: copying with state size {size}",
            recipe=replace(recipe, model_args={**recipe.model_args, "state_size": size}),
            arms=("default", "mimetic-ssm"),
            lrs=(1e-3, 4e-3) if scale == "cpu" else (3e-4, 1e-3, 4e-3),
        )
        for size in STATE_SIZES[scale]
    ]


def layers(scale: Scale) -> list[Plan]:
    """Return the comparison of writing structure into no layer, the first, the last, and all."""
    recipe = _copying("copy_mamba1", scale)
    if scale == "gpu":
        recipe = replace(recipe, model_args={**recipe.model_args, "pattern": "mamba1*4"})
    return [
        Plan(
            name="copy_mamba1",
            title="Layers: mimetic state-space structure in none, the first, the last, all",
            recipe=recipe,
            arms=("default", "mimetic-ssm-one", "mimetic-ssm-last", "mimetic-ssm"),
            lrs=(4e-3, 1e-2),
        )
    ]


def control(scale: Scale) -> list[Plan]:
    """Return the comparison on text, where recall is not the point: no large difference is expected."""
    changes: dict[str, Any] = {}
    if scale == "gpu":
        changes = {"data_args": {"length": 256}, "epochs": 20, "batch_size": 64}
        changes["model_args"] = {"dim": 384, "pattern": "mamba2*6", "state_size": 64, "head_dim": 64}
    return [
        Plan(
            name="shakespeare_mamba2",
            title="Control: characters of tiny Shakespeare, default against mimetic-ssm",
            recipe=replace(get_recipe("shakespeare_mamba2"), **changes),
            arms=("default", "mimetic-ssm"),
            lrs=(1e-3, 3e-3, 1e-2),
        )
    ]


READY: Mapping[str, Callable[[Scale], list[Plan]]] = {
    "lr-window": lr_window,
    "which-part": which_part,
    "state-capacity": state_capacity,
    "layers": layers,
    "control": control,
    **FILTER_STUDIES,
}
"""Studies of state-space recall, and of filters, by name."""


def _copying(name: str, scale: Scale) -> Recipe:
    """Return a copying recipe at a scale: sized so that all studies together take about an hour on two cores."""
    recipe = get_recipe(name)
    if scale == "cpu":
        short = {**recipe.data_args, "vocab_size": 12, "length": 12, "eval_examples": 256}
        return replace(recipe, epochs=6, batch_size=32, data_args=short, threads=1)
    data_args = {**recipe.data_args, "vocab_size": 29, "length": 50, "eval_examples": 512}
    return replace(recipe, epochs=100, eval_every=10, checkpoint_every=10, data_args=data_args)
