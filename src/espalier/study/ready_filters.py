"""Ready-made studies of filter covariances: which switches of the closed form, and what it is worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from espalier.recipes import Recipe, get_recipe
from espalier.recipes.arms_filters import FILTER_SWITCHES
from espalier.study.plan import Plan, Scale

_RATES = (1e-2, 3e-2)


def filter_switches(scale: Scale, *, frozen: bool = True) -> list[Plan]:
    """Return the study that settles the switches of the closed form: arms that depart from the default in one each.

    Filters are frozen, because training moves them from any start and hides what they were. The baseline is the default
    closed form; torch's own filters are the last arm, since no switch can be right that does not beat them.

    Args:
        scale: ``"cpu"``, or ``"gpu"``: ConvMixer-256/8, kernel 9, patch 2, on all of CIFAR-10 for 25 epochs.
        frozen: keep the filters as they were drawn; otherwise they are trained.
    """
    suffix, words = ("-frozen", "frozen") if frozen else ("", "trained")
    arms = (f"covariance{suffix}", *(f"covariance-{name}{suffix}" for name in FILTER_SWITCHES), f"default{suffix}")
    return [Plan(words, f"Switches of the filter covariance, filters {words}", _recipe(scale), arms, _RATES)]


def filter_switches_trained(scale: Scale) -> list[Plan]:
    """Return the same study with trained filters."""
    return filter_switches(scale, frozen=False)


def filter_worth(scale: Scale) -> list[Plan]:
    """Return the studies of what structured filters are worth: default against closed form, each trained and frozen.

    One plan for each of two kernels and two patch sizes.
    """
    base, plans = _recipe(scale), []
    for kernel, patch in ((9, 2), (5, 2), (9, 4), (5, 4)):
        arguments = {**base.model_args, "kernel_size": kernel, "patch_size": patch}
        plans.append(
            Plan(
                name=f"kernel={kernel}-patch={patch}",
                title=f"Filters of kernel {kernel}, patch {patch}: default against closed form, trained and frozen",
                recipe=replace(base, model_args=arguments),
                arms=("default", "covariance", "default-frozen", "covariance-frozen"),
                lrs=_RATES,
            )
        )
    return plans


FILTER_STUDIES: Mapping[str, Callable[[Scale], list[Plan]]] = {
    "filter-switches": filter_switches,
    "filter-switches-trained": filter_switches_trained,
    "filter-worth": filter_worth,
}
"""Studies of filters by name."""


def _recipe(scale: Scale) -> Recipe:
    if scale == "cpu":
        return get_recipe("convmixer_filters")
    published = get_recipe("convmixer_cifar10")
    return replace(published, model_args={**published.model_args, "kernel_size": 9}, eval_every=5)
