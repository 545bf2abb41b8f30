"""What to write into all depthwise layers of a model: a schedule of σ over depth, or measured statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from espalier.errors import EspalierError, unknown_name
from espalier.init.filters.closed_form import (
    Switches,
    centre_name,
    centre_tap,
    check_switches,
    depthwise_kernel,
    fill_filters_,
    filter_covariance,
    kernel_sizes,
)
from espalier.init.filters.statistics import FilterStatistics, LayerStatistics, check_depth

# Depth of layer i of n: (i + shift)/n, or i/(n−1) for "ends".
_SHIFTS = {"ends": None, "starts": 0.0, "middles": 0.5, "stops": 1.0}


class Schedule(NamedTuple):
    """σ over fractional depth d: ``σ(d) = σ₀ + v·d + ½·a·d²``."""

    sigma0: float
    v: float
    a: float


# What is read beside statistics; all else is of the closed form, which they replace.
_BESIDE_STATISTICS = ("centre", "depth_rule", "statistics")

# Remembered or inferred and not settled by experiment: our presets, not quotations of the paper.
PRESETS = {
    "patch-1": Schedule(0.16, 0.32, 2.88),
    "patch-2": Schedule(0.08, 0.37, 2.9),
    "convnext": Schedule(0.15, 0.5, 0.25),
}
# The middle one: it fits the networks of our own recipes best.
PRESETS["closed-form"] = PRESETS["patch-2"]


@dataclass(frozen=True)
class FilterCovariance:
    """How to initialise all depthwise layers of a model: a schedule of σ over depth, or measured statistics.

    ``σ(d) = σ₀ + v·d + ½·a·d²`` over fractional depth d in [0, 1], σ in squared taps. A preset gives (σ₀, v, a); any of
    the three replaces the preset's. ``FilterCovariance()`` is the published closed form (variance, wrapped, masked,
    clipped, raw scale) with the schedule ``"patch-2"``: nearly a single tap at the start and std ≈ 1.4 taps at the end.

    Attributes:
        preset: ``"closed-form"``, ``"patch-1"``, ``"patch-2"`` or ``"convnext"``.
        sigma0: σ of the first layer.
        v: growth of σ per unit of depth.
        a: growth of that growth.
        sigma_is_std: read σ as a standard deviation instead of a variance.
        wrap: measure the distance of taps around a torus; left out: yes, except for the variant ``"psd"``.
        mask: ``"x"``, or ``"y"`` for the transposed mask.
        centre: ``"middle"``: in a model the tap that meets the present, where that is found. Or ``"last"``, or a tap as
            in ``filter_covariance``, for all layers.
        variant: ``"clip"``, ``"abs"`` or ``"psd"``.
        scale: ``"raw"``, ``"unit"`` or ``"match_default"``.
        depth_rule: depth of layer i of n: ``"ends"`` i/(n−1), ``"starts"`` i/n, ``"middles"`` (i+½)/n, ``"stops"``
            (i+1)/n.
        statistics: measured covariances that replace the closed form; nothing else counts beside them but
            ``depth_rule`` and ``centre``, which must be the tap that they were measured about.

    Raises:
        EspalierError: an unknown preset or switch, a σ(d) that is not positive, statistics of another type, or a
            schedule or switch of the closed form beside them.

    Source: arXiv 2210.03651. The presets' numbers are unverified (see the guide).
    """

    preset: str = "closed-form"
    sigma0: float | None = None
    v: float | None = None
    a: float | None = None
    sigma_is_std: bool = False
    wrap: bool | None = None
    mask: str = "x"
    centre: str | int | Sequence[int] = "middle"
    variant: str = "clip"
    scale: str = "raw"
    depth_rule: str = "ends"
    statistics: FilterStatistics | None = None

    def __post_init__(self) -> None:
        if self.preset not in list(PRESETS):
            raise unknown_name("filter covariance preset", self.preset, PRESETS)
        if self.depth_rule not in list(_SHIFTS):
            raise unknown_name("depth_rule", self.depth_rule, _SHIFTS)
        check_switches(self.switches)
        if self.statistics is not None:
            self._check_statistics()
            return
        for name, published in PRESETS[self.preset]._asdict().items():
            if (given := getattr(self, name)) is None:
                object.__setattr__(self, name, published)
            elif not isinstance(given, Real) or not math.isfinite(given):
                raise EspalierError(f"{name} is {given!r}: give a finite number, or leave it to the preset")
        # σ is smallest at an end, or at the parabola's vertex if that lies between.
        vertex = -self.v / self.a if self.a and self.v is not None else 0.0
        lowest = min(map(self.sigma_at, (0.0, 1.0, min(max(vertex, 0.0), 1.0))))
        if not (math.isfinite(lowest) and lowest > 0):
            raise EspalierError(f"sigma falls to {lowest:.3g} over depth: choose sigma0, v and a that keep it positive")

    def _check_statistics(self) -> None:
        if not isinstance(self.statistics, FilterStatistics):
            given = f"{self.statistics!r}: give FilterStatistics, such as FilterStatistics.load(path)"
            raise EspalierError(f"statistics is {given}")
        for field in fields(self):
            if field.name not in _BESIDE_STATISTICS and (value := getattr(self, field.name)) != field.default:
                raise EspalierError(
                    f"{field.name} is {value!r}, but statistics replace the closed form that it belongs to: leave "
                    f"{field.name} or the statistics out"
                )

    @property
    def switches(self) -> Switches:
        """The keyword arguments of ``filter_covariance``."""
        return {name: getattr(self, name) for name in Switches.__annotations__}  # type: ignore[return-value]

    def sigma_at(self, depth: float) -> float:
        """Return σ at a fractional depth in [0, 1].

        Raises:
            EspalierError: the depth lies outside, or the filters come from statistics and have no σ.
        """
        if self.sigma0 is None or self.v is None or self.a is None:
            raise EspalierError("filters drawn from statistics have no sigma: ask covariance() instead")
        check_depth(depth)
        return self.sigma0 + self.v * depth + self.a * depth**2 / 2

    def depth_of(self, index: int, count: int) -> float:
        """Return the fractional depth of layer ``index`` of ``count`` (½ for one on its own under ``"ends"``)."""
        if (shift := _SHIFTS[self.depth_rule]) is not None:
            return (index + shift) / count
        return index / (count - 1) if count > 1 else 0.5

    def covariance(self, kernel_size: int | Sequence[int], depth: float, *, dim: int = 2) -> Tensor:
        """Return the covariance (K, K), float64, of the filters at a fractional depth.

        Raises:
            EspalierError: a kernel or depth that ``filter_covariance`` or ``layer_at`` refuses, or statistics that were
                measured about another tap than ``centre``.
        """
        if self.statistics is not None:
            return self._measured(kernel_sizes(kernel_size, dim), depth).covariance
        return filter_covariance(kernel_size, self.sigma_at(depth), dim=dim, **self.switches)

    def write_(self, weight: Tensor, depth: float, *, generator: torch.Generator | None = None) -> str:
        """Fill the filters (h, 1, *k) of the layer at a fractional depth in place and return in words with what."""
        sizes = depthwise_kernel(weight)
        fill_filters_(weight, self.covariance(sizes, depth), generator)
        if self.statistics is None:
            return f"σ {self.sigma_at(depth):.3g}"
        # Only filters over time are ever about their last tap.
        unknown = len(sizes) == 1 and self._measured(sizes, depth).centre is None
        return f"statistics at depth {depth:.2f}" + ", about a tap that they do not name" * unknown

    def _measured(self, sizes: tuple[int, ...], depth: float) -> LayerStatistics:
        assert self.statistics is not None
        layer = self.statistics.layer_at(depth, sizes)
        wanted = centre_name(sizes, self.centre)
        if layer.centre not in (None, wanted):
            name = centre_tap(sizes, self.centre) if wanted is None else wanted
            raise EspalierError(
                f"statistics of {layer.name!r} are of filters about their {layer.centre} tap, not about the {name} "
                f"one: measure a network whose layers are {'' if wanted == 'last' else 'not '}causal"
            )
        return layer
