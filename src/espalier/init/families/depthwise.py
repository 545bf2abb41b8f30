"""The family of depthwise filters: written with a covariance, measured by how near they are to the closed form."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from espalier.errors import EspalierError
from espalier.init.families.base import LARGEST, Family, Place
from espalier.init.filters.fit import FilterFit, covariance_fit
from espalier.init.filters.spec import FilterCovariance
from espalier.init.layouts import DepthwiseWeights
from espalier.init.layouts.registry import attribute

# σ(d) has three coefficients, and a layer's own σ says nothing of the others': fewer layers fit a line or a constant.
_COEFFICIENTS = 3


@dataclass(frozen=True)
class DepthwiseFit:
    """What one depthwise layer's filters are near to.

    Attributes:
        layer: its name.
        sigma: σ of the nearest closed form, in squared taps.
        error: relative distance to it; ``white_error`` that to independent weights.
        white_error: see ``error``.
    """

    layer: str
    sigma: float
    error: float
    white_error: float

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
        if filters.is_meta or len(filters) < 2 or not filters.isfinite().all():
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

    def spec(self, rows: Sequence[DepthwiseFit]) -> FilterCovariance | None:
        """Return the closed form whose ``σ(d) = σ₀ + v·d + ½·a·d²`` is nearest to the layers' σ by least squares.

        Fewer than three layers fit a line or a constant. Where the best curve would dip to zero between layers, the
        constant of the layers' mean is returned. Layers without a σ (all filters equal) do not count.
        """
        sigmas = [row.sigma for row in rows if math.isfinite(row.sigma)]
        sigma_N = torch.tensor(sigmas, dtype=torch.float64, device="cpu")
        count = len(sigmas)
        if not count:
            return None
        depth_N = torch.arange(count, dtype=torch.float64, device="cpu") / max(count - 1, 1)
        powers_N3 = torch.stack([depth_N**0, depth_N, depth_N**2 / 2], dim=1)[:, : min(count, _COEFFICIENTS)]
        fitted = torch.linalg.lstsq(powers_N3, sigma_N[:, None]).solution.flatten().tolist()
        sigma0, v, a = [*fitted, 0.0, 0.0][:_COEFFICIENTS]
        try:
            return FilterCovariance(sigma0=sigma0, v=v, a=a)
        except EspalierError:  # σ(d) is not positive everywhere
            return FilterCovariance(sigma0=float(sigma_N.mean()), v=0.0, a=0.0)

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
