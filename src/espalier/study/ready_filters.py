"""Ready-made studies of filter covariances: which switches of the closed form, then what it is worth."""

from __future__ import annotations

from dataclasses import replace

from espalier.recipes import Recipe, get_recipe
from espalier.recipes.arms_filters import FILTER_SWITCHES
from espalier.study.plan import SEEDS, Plan, Scale

# Every switch is judged by frozen filters first: training moves filters from any start and hides what they were.
_RATES = (1e-2, 3e-2)


def filters_plan(scale: Scale = "cpu", *, frozen: bool = True) -> Plan:
    """Return the study that settles the switches of the closed form, each departing from the default in one of them.

    The baseline is the default closed form. Torch's own filters are the last arm: no switch can be right that does not
    beat them. Every arm gets the same rates and seeds.

    Args:
        scale: ``"gpu"`` takes the published script's recipe and all of CIFAR-10.
        frozen: keep the filters as they were drawn; otherwise they are trained.
    """
    suffix = "-frozen" if frozen else ""
    return Plan(
        name=f"switches{suffix}",
        title=f"Switches of the filter covariance, {'frozen' if frozen else 'trained'}, on CIFAR-10",
        recipe=_recipe(scale),
        arms=(
            f"covariance{suffix}",
            *(f"covariance-{name}{suffix}" for name in FILTER_SWITCHES),
            f"default{suffix}",
        ),
        lrs=_RATES,
        seeds=SEEDS,
    )


def filters_headline_plan(scale: Scale = "cpu", statistics: str | None = None) -> Plan:
    """Return the study of what structured filters are worth: default against closed form, trained and frozen.

    Args:
        scale: as for ``filters_plan``.
        statistics: file that ``espalier statistics`` wrote; adds the arms of transferred covariances.
    """
    recipe = _recipe(scale)
    arms: tuple[str, ...] = ("default", "covariance", "default-frozen", "covariance-frozen")
    if statistics is not None:
        recipe = replace(recipe, init_args={"statistics": statistics})
        arms += ("transferred", "transferred-frozen")
    return Plan("headline", "Filters: default against closed form, trained and frozen", recipe, arms, _RATES)


def _recipe(scale: Scale) -> Recipe:
    return get_recipe("convmixer_filters" if scale == "cpu" else "convmixer_cifar10")
