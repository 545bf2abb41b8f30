"""Ready-made studies of filter covariances: which switches of the closed form, then what it is worth."""

from __future__ import annotations

from dataclasses import replace

from espalier.recipes import get_recipe
from espalier.recipes.arms_filters import FILTER_SWITCHES
from espalier.study.ready import Plan

# Every switch is judged by frozen filters first: training moves filters from any start and hides what they were.
_RATES = (1e-2, 3e-2)
_SEEDS = (0, 1, 2)


def filters_plan(*, frozen: bool = True) -> Plan:
    """Return the study that settles the switches of the closed form, each departing from the default in one of them.

    The baseline is the default closed form. Torch's own filters are the last arm: no switch can be right that does not
    beat them. Every arm gets the same rates and seeds.

    Args:
        frozen: keep the filters as they were drawn; otherwise they are trained.
    """
    suffix = "-frozen" if frozen else ""
    return Plan(
        title=f"Switches of the filter covariance, {'frozen' if frozen else 'trained'}, on 4,000 CIFAR-10 images",
        recipe=get_recipe("convmixer_filters"),
        arms=(
            f"covariance{suffix}",
            *(f"covariance-{name}{suffix}" for name in FILTER_SWITCHES),
            f"default{suffix}",
        ),
        lrs=_RATES,
        seeds=_SEEDS,
    )


def filters_headline_plan(statistics: str | None = None) -> Plan:
    """Return the study of what structured filters are worth: default against closed form, trained and frozen.

    Args:
        statistics: file that ``espalier statistics`` wrote; adds the arms of transferred covariances.
    """
    recipe = get_recipe("convmixer_filters")
    arms: tuple[str, ...] = ("default", "covariance", "default-frozen", "covariance-frozen")
    if statistics is not None:
        recipe = replace(recipe, init_args={"statistics": statistics})
        arms += ("transferred", "transferred-frozen")
    return Plan("Filters: default, closed form, transferred", recipe, arms, _RATES, _SEEDS)
