"""Read state-space layers and depthwise filters off a trained model: the arguments that start another one like it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from espalier.init.filters.fit import covariance_fit
from espalier.init.filters.spec import FilterCovariance
from espalier.init.layouts import DepthwiseWeights, SSMWeights
from espalier.init.ssm import MimeticSSM, measure_ssm

# σ(d) has three coefficients, and a layer's own σ says nothing of the others': fewer layers fit a line or a constant.
_COEFFICIENTS = 3


@dataclass(frozen=True)
class SSMFit:
    """What one state-space layer is near to; ``MimeticSSM`` says what the parts are.

    Attributes:
        layer: its name.
        family: ``"mamba1"`` or ``"mamba2"``.
        decay: c of ``−A = exp(−c)``: minus the mean of ``A_log``; negative where states forget fast.
        abar: the mean of Ā at zero input.
        delta: the mean of Δ at zero input.
        correlate: the cosine of W_C and W_B.
        convolution: the distance of the taps from the identity over the identity's norm.
    """

    layer: str
    family: str
    decay: float
    abar: float
    delta: float
    correlate: float
    convolution: float

    def __str__(self) -> str:
        return (
            f"{self.layer or '(model)'}: {self.family}, Ā {self.abar:.4g}, Δ {self.delta:.3g}, "
            f"A -exp({-self.decay:+.3g}), W_C·W_B correlated {self.correlate:+.3f}, "
            f"convolution {self.convolution:.2f} from the identity"
        )


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


def fit_ssm(name: str, weights: SSMWeights) -> SSMFit:
    """Return the fit of one state-space layer."""
    bias = weights.delta_bias + sum(weights.delta_shifts) if weights.delta_shifts else weights.delta_bias
    measured = measure_ssm(weights.w_b, weights.w_c, weights.a_log, bias, weights.conv_weight, weights.groups)
    decay = -float(weights.a_log.double().mean())
    parts = (measured[key] for key in ("decay", "delta", "correlation", "convolution"))
    return SSMFit(name, weights.family, decay, *parts)


def fit_depthwise(name: str, weights: DepthwiseWeights) -> DepthwiseFit:
    """Return the fit of one layer's filters to the closed form with its default switches."""
    found = covariance_fit(weights.weight)
    return DepthwiseFit(name, found.sigma, found.error, found.white_error)


def ssm_spec(rows: Sequence[SSMFit]) -> MimeticSSM:
    """Return the spec of the mean layer: parts that are not there (fast decay, a far convolution) are left alone."""
    decay, delta, correlate, distance = torch.tensor(
        [[row.decay, row.delta, row.correlate, row.convolution] for row in rows], dtype=torch.float64
    ).mean(0)
    return MimeticSSM(
        decay=float(decay) if decay > 0 else None,
        delta=float(delta),
        correlate=float(correlate.clamp(-1, 1)),
        convolution=bool(distance < 0.5),
    )


def filter_spec(rows: Sequence[DepthwiseFit]) -> FilterCovariance:
    """Return the closed form whose ``σ(d) = σ₀ + v·d + ½·a·d²`` is nearest to the layers' σ by least squares.

    Fewer than three layers fit a line or a constant. Where the best curve would dip to zero between layers, the
    constant of the layers' mean is returned.
    """
    sigma_N = torch.tensor([row.sigma for row in rows], dtype=torch.float64)
    count = len(rows)
    depth_N = torch.arange(count, dtype=torch.float64) / max(count - 1, 1)
    powers_N3 = torch.stack([depth_N**0, depth_N, depth_N**2 / 2], dim=1)[:, : min(count, _COEFFICIENTS)]
    fitted = torch.linalg.lstsq(powers_N3, sigma_N[:, None]).solution.flatten().tolist()
    sigma0, v, a = [*fitted, 0.0, 0.0][:_COEFFICIENTS]
    along = torch.linspace(0, 1, 101, dtype=torch.float64)
    if float((sigma0 + v * along + a * along**2 / 2).min()) <= 0:
        sigma0, v, a = float(sigma_N.mean()), 0.0, 0.0
    return FilterCovariance(sigma0=sigma0, v=v, a=a)
