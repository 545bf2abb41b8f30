"""How much of the closed form is in given filters: their covariance, its sampling error, and the best fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Unpack

import torch
from torch import Tensor

from espalier.contents import without_numbers
from espalier.errors import EspalierError
from espalier.init.filters.closed_form import (
    Switches,
    centre_tap,
    depthwise_kernel,
    filter_covariance,
    unrepaired_covariance,
)

# Variances searched: at the lower end the closed form is a single tap, at the upper end it is flat over any kernel.
_SIGMA_RANGE = (0.02, 50.0)
_GRID = 17
_ZOOMS = 5


class ClosedFormFit(NamedTuple):
    """The multiple of the closed form nearest to a covariance in the Frobenius norm.

    Attributes:
        sigma: σ of the closed form; nan if there is nothing to fit (all filters equal).
        amplitude: the factor before it.
        error: ‖Σ − amplitude·Σ(σ)‖ / ‖Σ‖, with the sampling error of Σ taken out.
    """

    sigma: float
    amplitude: float
    error: float


class FilterFit(NamedTuple):
    """What ``covariance_fit`` reads off one layer's filters.

    Attributes:
        sigma: σ of the nearest closed form.
        error: relative Frobenius distance to it, with the sampling error taken out: 0 follows it, 1 has nothing of it.
        white_error: the same distance to the nearest multiple of the identity, which torch's default has: near 0 for
            it.
        concentration: 1 − E‖x − c‖² over the filters' energy / over equal energy at every tap: 0 for white filters, 1
            for one tap.
    """

    sigma: float
    error: float
    white_error: float
    concentration: float

    @property
    def structured(self) -> bool:
        """Whether the closed form explains the filters better than independent weights do.

        Sixteen filters of nine taps are too few to be sure: 6 of 600 such layers of independent weights seemed to be.
        """
        return self.error < self.white_error


def pooled_covariance(groups: Sequence[Tensor]) -> tuple[Tensor, float]:
    """Return the pooled covariance of groups of filters and the square of its expected sampling error.

    ``S = Σ f fᵀ / Σ(n_j − 1)`` with f a filter less the mean of its own group, and
    ``E‖S − Σ‖² ≈ (mean ‖f‖⁴ − ‖S‖²) / (Σ(n_j − 1) − 1)``, which assumes no particular distribution of the filters.

    Args:
        groups: one (n_j, K) tensor a network.

    Returns:
        S of shape (K, K), float64 on the CPU, and the squared Frobenius error.

    Raises:
        EspalierError: a group of fewer than 2 filters, on the meta device, not of floating point, or not finite.

    Source: Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices" (2004), lemma 3.3.
    """
    centred = []
    for filters_NK in groups:
        if without_numbers(filters_NK) or len(filters_NK) < 2:
            raise EspalierError(
                f"filters of shape {tuple(filters_NK.shape)} have no covariance: 2 with values are needed"
            )
        if not filters_NK.is_floating_point():
            raise EspalierError(
                f"filters of dtype {filters_NK.dtype} have no covariance: measure full-precision weights"
            )
        if not filters_NK.isfinite().all():
            raise EspalierError(f"filters of shape {tuple(filters_NK.shape)} are not finite: was training diverging?")
        f_NK = filters_NK.detach().double().cpu()
        # Dividing by n − 1 is the same as stretching every centred filter.
        centred.append((f_NK - f_NK.mean(0)) * math.sqrt(len(f_NK) / (len(f_NK) - 1)))
    f_NK = torch.cat(centred)
    free = len(f_NK) - len(groups)
    weights_N = torch.cat(
        [torch.full((len(f),), (1 - 1 / len(f)) / free, dtype=torch.float64, device="cpu") for f in centred]
    )
    covariance_KK = (f_NK * weights_N[:, None]).mT @ f_NK
    fourth = float(weights_N @ f_NK.square().sum(1).square())
    return covariance_KK, max(fourth - float(covariance_KK.square().sum()), 0.0) / max(free - 1, 1)


def fit_closed_form(
    covariance: Tensor, sizes: tuple[int, ...], *, sampling_variance: float = 0.0, **switches: Unpack[Switches]
) -> ClosedFormFit:
    """Find σ and the factor of the closed form nearest to a covariance: the largest cosine, by a grid that zooms in.

    Args:
        covariance: Σ, shape (K, K).
        sizes: taps along every axis of the kernel.
        sampling_variance: expected squared Frobenius error of Σ, taken out of the error that is returned.
        switches: as in ``filter_covariance``.

    Returns:
        The fit.
    """
    norm = float(covariance.norm())
    if not norm > 0:
        return ClosedFormFit(math.nan, 0.0, 1.0)

    def cosine(log_sigma: float) -> float:
        # The repair changes the closed form by a few per cent and needs an eigen-decomposition: left for the end.
        form_KK = unrepaired_covariance(sizes, math.exp(log_sigma), **switches)
        return float((form_KK * covariance).sum() / form_KK.norm())

    power = 0.5 if switches.get("sigma_is_std") else 1.0
    low, high = (power * math.log(sigma) for sigma in _SIGMA_RANGE)
    best = low
    for _ in range(_ZOOMS):
        grid = torch.linspace(low, high, _GRID, dtype=torch.float64, device="cpu").tolist()
        best = max(grid, key=cosine)
        step = grid[1] - grid[0]
        low, high = max(best - step, grid[0]), min(best + step, grid[-1])
    form_KK = filter_covariance(sizes, math.exp(best), **switches)
    inner, energy = float((form_KK * covariance).sum()), float(form_KK.square().sum())
    return ClosedFormFit(math.exp(best), inner / energy, _error(inner**2 / energy, norm**2 - sampling_variance))


def covariance_fit(weight: Tensor, **switches: Unpack[Switches]) -> FilterFit:
    """Measure how closely a depthwise layer's filters follow the closed form, and how far they are from white noise.

    Args:
        weight: shape (h, 1, *k), h ≥ 2.
        switches: of the closed form, as in ``filter_covariance``.

    Returns:
        σ, the two errors and the concentration.

    Raises:
        EspalierError: the weight is not depthwise, has no values, or is not finite.
    """
    sizes = depthwise_kernel(weight)
    covariance_KK, sampling_variance = pooled_covariance([weight.flatten(1)])
    fit = fit_closed_form(covariance_KK, sizes, sampling_variance=sampling_variance, **switches)
    if math.isnan(fit.sigma):
        return FilterFit(fit.sigma, 1.0, 1.0, 0.0)
    trace, norm_squared = float(covariance_KK.trace()), float(covariance_KK.square().sum())
    white_error = _error(trace**2 / len(covariance_KK), norm_squared - sampling_variance)
    centre = centre_tap(sizes, switches.get("centre", "middle"))
    axes = [(torch.arange(k, dtype=torch.float64, device="cpu") - c) ** 2 for k, c in zip(sizes, centre, strict=True)]
    squared_K = torch.stack([axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")]).sum(0)
    # How much nearer to the centre the energy lies than if it were spread evenly.
    concentration = 1 - float(covariance_KK.diagonal() @ squared_K) / trace / float(squared_K.mean())
    return FilterFit(fit.sigma, fit.error, white_error, concentration)


def _error(explained: float, total: float) -> float:
    """Return the root of the unexplained share, held in [0, 1] where the sampling error was overestimated."""
    return math.sqrt(1 - min(explained / total, 1.0)) if total > 0 else 0.0
