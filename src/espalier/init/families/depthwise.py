"""The family of depthwise filters: written with a covariance, measured by how near they are to the closed form."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from espalier.contents import without_numbers
from espalier.errors import EspalierError
from espalier.init.families.base import LARGEST, Family, Place
from espalier.init.filters.fit import FilterFit, covariance_fit
from espalier.init.filters.spec import FilterCovariance
from espalier.init.layouts import DepthwiseWeights
from espalier.init.layouts.registry import attribute

# σ(d) has three coefficients, and a layer's own σ says nothing of the others': fewer layers fit a line or a constant.
_COEFFICIENTS = 3
# Depths tried for the lowest point of a curve that is to stay above zero.
_TURNS = 201


@dataclass(frozen=True)
class DepthwiseFit:
    """What one depthwise layer's filters are near to.

    Attributes:
        layer: its name.
        sigma: σ of the nearest closed form, in squared taps.
        error: relative distance to it; ``white_error`` that to independent weights.
        white_error: see ``error``.
        place: its index among the depthwise layers of its model, and their number; empty in records from before it was
            kept, whose layers are taken to lie evenly.

    Raises:
        EspalierError: a place that no layer has.
    """

    layer: str
    sigma: float
    error: float
    white_error: float
    place: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        given = self.place
        whole = isinstance(given, tuple) and all(type(part) is int for part in given)
        if not whole or (given and not (len(given) == 2 and 0 <= given[0] < given[1])):
            raise EspalierError(f"place is {given!r}: give (index, number of layers), or nothing")

    def __str__(self) -> str:
        return (
            f"{self.layer or '(model)'}: filters σ {self.sigma:.3g}, error {self.error:.2f} "
            f"(independent weights {self.white_error:.2f})"
        )


class DepthwiseFamily(Family):
    """Depthwise convolutions, whose filters get a covariance."""

    kind = "depthwise"
    default = FilterCovariance()
    row = DepthwiseFit

    def write(self, weights: DepthwiseWeights, spec: FilterCovariance, place: Place, generator: torch.Generator) -> str:
        """Draw the filters of the layer's depth, about its own centre unless another one is asked for."""
        if spec.centre == "middle":
            spec = replace(spec, centre=weights.centre)
        return spec.write_(weights.weight, spec.depth_of(*place), generator=generator)

    def set_by_hand(self, weights: DepthwiseWeights) -> str:
        """Say so of one pattern that all channels have, such as a blur."""
        filters = weights.weight.flatten(1)
        if without_numbers(filters) or len(filters) < 2 or not filters.isfinite().all():
            return ""
        same = bool((filters == filters[:1]).all()) and bool((filters[0] != filters[0, 0]).any())
        return "all its filters are the same: they were set by hand (a blur)" if same else ""

    def measure(self, weights: DepthwiseWeights) -> dict[str, float]:
        """Return the fields of ``FilterFit``."""
        return covariance_fit(weights.weight, centre=weights.centre)._asdict()

    def verify(
        self, weights: DepthwiseWeights, spec: FilterCovariance, place: Place, measured: Mapping[str, float]
    ) -> str:
        """Contradict nothing: the covariance of few filters says too little to hold a particular σ against them.

        A layer that another one overwrote is found by its sums, which are no longer those taken after writing.
        """
        return ""

    def scores(self, measured: Mapping[str, float]) -> dict[str, float]:
        """Return how much nearer the filters are to the closed form than to independent weights."""
        found = FilterFit(**measured)
        if not math.isfinite(found.sigma):
            return {"covariance": 0.0}
        ratio = found.white_error / max(found.error, 1e-9)
        return {"covariance": ratio if found.structured else min(ratio, 0.99)}

    def damage(self, weights: DepthwiseWeights, sums: Mapping[str, float]) -> str:
        """Name filters that overflow what follows them; the other figures do not depend on their size."""
        if found := super().damage(weights, sums):
            return found
        most = float(weights.weight.abs().max())
        return f"weight reaches {most:.3g}: values of this size cannot train" if most > LARGEST else ""

    def fit(self, name: str, weights: DepthwiseWeights) -> DepthwiseFit:
        """Return the fit to the closed form with its default switches, about the layer's own centre."""
        found = covariance_fit(weights.weight, centre=weights.centre)
        return DepthwiseFit(name, found.sigma, found.error, found.white_error)

    def placed(self, fitted: DepthwiseFit, place: Place) -> DepthwiseFit:
        """Return the fit with its place: σ depends on depth."""
        return replace(fitted, place=place)

    def spec(self, rows: Sequence[DepthwiseFit]) -> FilterCovariance | None:
        """Return the closed form whose ``σ(d) = σ₀ + v·d + ½·a·d²`` is nearest to the layers' σ by least squares.

        d is the depth at which each layer was measured, as ``structure_`` counts it. Fewer than three layers fit a line
        or a constant. Where the best curve would dip to zero between layers, the constant of the layers' mean is
        returned; where it would before the first or beyond the last, the best one that stays above half of the least σ.
        Layers without a σ (all filters equal) have no say.
        """
        rows = [row for row in rows if math.isfinite(row.sigma)]
        count = len(rows)
        if not count:
            return None
        placed = all(row.place for row in rows)
        places = [row.place if placed else (index, count) for index, row in enumerate(rows)]
        depths = [self.default.depth_of(index, of) for index, of in places]
        depth_N, sigma_N = torch.tensor([depths, [row.sigma for row in rows]], dtype=torch.float64, device="cpu")
        powers_N3 = torch.stack([depth_N**0, depth_N, depth_N**2 / 2], dim=1)[:, : min(count, _COEFFICIENTS)]
        fitted = torch.linalg.lstsq(powers_N3, sigma_N[:, None]).solution.flatten().tolist()
        sigma0, v, a = [*fitted, 0.0, 0.0][:_COEFFICIENTS]
        try:
            return FilterCovariance(sigma0=sigma0, v=v, a=a)
        except EspalierError:  # σ(d) is not positive everywhere
            sigma0, v, a = _held_above_zero(depth_N, sigma_N)
            return FilterCovariance(sigma0=sigma0, v=v, a=a)

    def lines(self, rows: Sequence[DepthwiseFit]) -> list[str]:
        """Return a line a layer, and what to ask for."""
        spec = self.spec(rows)
        asked = [] if spec is None else [f"ask for sigma0={spec.sigma0:.3g}, v={spec.v:.3g}, a={spec.a:.3g}"]
        return [*map(str, rows), *asked]

    def note(self, weights: DepthwiseWeights, module: nn.Module) -> str:
        """Say where the closed form was not made for the layer: strides, and kernels of 3 taps at most."""
        stride = attribute(module, "stride", 1)
        notes = [weights.note]
        if max(stride if isinstance(stride, tuple) else (stride,)) > 1:
            notes.append("strided: the closed form is of filters that keep the resolution")
        if max(weights.weight.shape[2:]) <= 3:
            notes.append("3 taps an axis: the closed form is of larger kernels (from 5)")
        return "; ".join(filter(None, notes))


def _held_above_zero(depth_N: Tensor, sigma_N: Tensor) -> tuple[float, float, float]:
    """Return (σ₀, v, a) of the nearest ``ε + ½·a·(d − m)²``, a ≥ 0, with m where no layer was measured, or a constant.

    ε is half of the least σ. Layers that cannot be measured leave such places at the ends, where nothing else holds a
    curve through the others above zero.
    """
    mean = float(sigma_N.mean())
    best, found = float((sigma_N - mean).square().sum()), (mean, 0.0, 0.0)
    floor = float(sigma_N.min()) / 2
    for m in torch.linspace(0, 1, _TURNS, dtype=torch.float64, device="cpu").tolist():
        if depth_N.min() <= m <= depth_N.max():
            continue
        bent_N = (depth_N - m).square() / 2
        a = max(float(bent_N @ (sigma_N - floor) / (bent_N @ bent_N)), 0.0)
        error = float((floor + a * bent_N - sigma_N).square().sum())
        if error < best:
            best, found = error, (floor + a * m**2 / 2, -a * m, a)
    return found
