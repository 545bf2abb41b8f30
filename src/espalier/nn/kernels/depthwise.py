"""The compiled depthwise convolution, and the compiled GELU with batch norm, on channels-last maps.

Maps are (B, C, H, W) in float32, bfloat16 or float64; what is summed, and every parameter, is in float32 or float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from espalier.nn.kernels import formulas
from espalier.nn.kernels.arguments import (
    DEPTHWISE_BACKWARD,
    DEPTHWISE_FORWARD,
    GELU_NORM_BACKWARD,
    GELU_NORM_FORWARD,
)
from espalier.nn.kernels.cpu import needs_grad
from espalier.nn.kernels.library import call

Padding = tuple[int, int, int, int]  # rows of zeros above and below, columns left and right

# Shares of the batch whose weight gradients are summed apart, fixed so that results do not depend on the threads.
_SHARES = 8


class Norm(NamedTuple):
    """What batch norm does: scale γ, shift β, ε, and the statistics if they are given, not taken from the rows."""

    weight: Tensor
    shift: Tensor
    eps: float
    mean: Tensor | None
    variance: Tensor | None


def _channels_last(x: Tensor) -> Tensor:
    return x.resolve_neg().contiguous(memory_format=torch.channels_last)


def _empty(like: Tensor, *size: int) -> Tensor:
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _taps(weight_C1RS: Tensor) -> Tensor:
    """Return the taps (R·S, C)."""
    return weight_C1RS.flatten(1).t().contiguous()


def _sizes(x: Tensor, weight: Tensor, padding: Padding) -> dict[str, int]:
    (batch, channels, height, width), (rows, columns) = x.shape, weight.shape[2:]
    top, bottom, left, right = padding
    return {
        "batch": batch,
        "height": height,
        "width": width,
        "channels": channels,
        "rows": rows,
        "columns": columns,
        "top": top,
        "left": left,
        "out_height": height + top + bottom - rows + 1,
        "out_width": width + left + right - columns + 1,
    }


_NO_NORM = {"weight": None, "shift": None, "eps": 0.0, "mean": None, "variance": None}


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, padding: Padding, norm: Norm | None = None) -> Tensor:
    """Return the convolution c, or with a norm of given statistics ``x + norm(GELU(c))``."""
    sizes = _sizes(x, weight, padding)
    y = _empty(x, *x.shape[:2], sizes["out_height"], sizes["out_width"])
    given = _NO_NORM if norm is None else norm._asdict()
    call(DEPTHWISE_FORWARD, x.dtype, x=x, taps=_taps(weight), bias=bias, **given, y=y, **sizes)
    return y


def _convolve_backward(
    x: Tensor, weight: Tensor, dy: Tensor, add: Tensor | None, padding: Padding, wanted: tuple[bool, bool, bool],
    *, in_place: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients of x (plus ``add``), weight and bias, None where they are not wanted.

    The first is in the memory of dy, which is as large then, if ``in_place``: fresh memory is slow.
    """
    shares = max(1, min(_SHARES, x.shape[0]))
    dx = (dy if in_place else _empty(x, *x.shape)) if wanted[0] else None
    dtaps = weight.new_empty(shares, weight[0].numel(), len(weight)) if wanted[1] else None
    dbias = weight.new_empty(shares, len(weight)) if wanted[2] else None
    tensors = {"x": x, "dy": dy, "add": add, "taps": _taps(weight), "dx": dx, "dtaps": dtaps, "dbias": dbias}
    call(DEPTHWISE_BACKWARD, x.dtype, **tensors, **_sizes(x, weight, padding), shares=shares)
    dweight = None if dtaps is None else dtaps.sum(0).T.reshape(weight.shape)
    return dx, dweight, None if dbias is None else dbias.sum(0)


def _norm_sizes(u: Tensor, eps: float, fixed: bool) -> dict[str, Any]:
    return {"eps": eps, "rows": u.numel() // max(1, u.shape[1]), "channels": u.shape[1], "fixed": fixed}


def _normalise(
    u: Tensor, residual: Tensor | None, bias: Tensor | None, norm: Norm, *, in_place: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (γ·(GELU(u + bias) − μ)/σ + β + residual, μ, σ²), the first in the memory of u if ``in_place``."""
    y = u if in_place else _empty(u, *u.shape)
    mean, variance = (norm.weight.new_empty(u.shape[1]) if t is None else t for t in (norm.mean, norm.variance))
    inputs = {"u": u, "residual": residual, "bias": bias, "weight": norm.weight, "shift": norm.shift}
    sizes = _norm_sizes(u, norm.eps, norm.mean is not None)
    call(GELU_NORM_FORWARD, u.dtype, **inputs, y=y, mean=mean, variance=variance, **sizes)
    return y, mean, variance


def _normalise_backward(
    u: Tensor, bias: Tensor | None, weight: Tensor, statistics: Sequence[Tensor], dy: Tensor, *sizes: Any
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Return the gradients of (u, bias, γ, β); the sizes are ε and whether the statistics were given."""
    du = _empty(u, *u.shape)
    dbias, dweight, dshift = (weight.new_empty(u.shape[1]) for _ in range(3))
    inputs = {"u": u, "dy": dy, "bias": bias, "weight": weight, "mean": statistics[0], "variance": statistics[1]}
    outputs = {"du": du, "dbias": dbias, "dweight": dweight, "dshift": dshift}
    call(GELU_NORM_BACKWARD, u.dtype, **inputs, **outputs, **_norm_sizes(u, *sizes))
    return du, None if bias is None else dbias, dweight, dshift


def gelu_norm(u: Tensor, bias: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y, μ, σ²) of batch norm after GELU of u + bias, and overwrite u if no gradient is wanted."""
    if needs_grad(u, bias, norm.weight, norm.shift):
        return _GeluNorm.apply(_channels_last(u), bias, norm.weight, norm.shift, norm)
    return _normalise(_channels_last(u), None, bias, norm, in_place=True)


def mix(x: Tensor, taps: Tensor, bias: Tensor | None, norm: Norm, padding: Padding) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y, μ, σ²) with y = x + batch norm of GELU of (x convolved with the taps + bias)."""
    if needs_grad(x, taps, bias, norm.weight, norm.shift):
        return _Mix.apply(_channels_last(x), taps, bias, norm.weight, norm.shift, norm, padding)
    x = _channels_last(x)
    if norm.mean is None or norm.variance is None:
        return _normalise(_convolve(x, taps, None, padding), x, bias, norm, in_place=True)
    return _convolve(x, taps, bias, padding, norm), norm.mean, norm.variance


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, padding: Padding) -> Tensor:
    """Return the depthwise convolution of x with ``weight`` (C, 1, R, S), stride 1, in a frame of zeros."""
    y: Tensor = _Depthwise.apply(_channels_last(x), weight, bias, padding)
    return y


# These three take channels-last maps and keep them as they were given, so that second derivatives find the way on and
# no map is converted twice.
class _Depthwise(torch.autograd.Function):
    """See ``depthwise``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: Padding) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.padding = padding
        return _convolve(x, weight, bias, padding)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, _ = given = ctx.saved_tensors
        if formulas.by_formula():
            found = formulas.differentiate(lambda x, w, b: formulas.depthwise(x, w, b, ctx.padding), given, (dy,))
            return *found, None
        wanted = ctx.needs_input_grad[:3]
        return *_convolve_backward(x, weight, _channels_last(dy), None, ctx.padding, wanted), None


class _GeluNorm(torch.autograd.Function):
    """Batch norm after GELU: (y, μ, σ²) of u + bias; only u is kept."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, bias: Tensor | None, weight: Tensor, shift: Tensor, norm: Norm
    ) -> tuple[Tensor, ...]:
        y, *statistics = _normalise(u, None, bias, norm)
        ctx.save_for_backward(u, bias, weight, shift, *statistics)
        ctx.sizes = norm.eps, norm.mean is not None
        ctx.mark_non_differentiable(*statistics)
        return y, *statistics

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        u, bias, weight, shift, *statistics = ctx.saved_tensors
        if formulas.by_formula():
            given = u, bias, weight, shift
            found = formulas.differentiate(lambda *t: formulas.gelu_norm(*t, *statistics, *ctx.sizes), given, (dy,))
            return *found, None
        return *_normalise_backward(u, bias, weight, statistics, _channels_last(dy), *ctx.sizes), None


class _Mix(torch.autograd.Function):
    """ConvMixer's mixing of pixels, (``x + BN(GELU(depthwise(x) + bias))``, μ, σ²); x and the convolution are kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, taps: Tensor, bias: Tensor | None, weight: Tensor, shift: Tensor, norm: Norm,
        padding: Padding,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        u = _convolve(x, taps, None, padding)
        y, *statistics = _normalise(u, x, bias, norm)
        ctx.save_for_backward(x, u, taps, bias, weight, shift, *statistics)
        ctx.sizes, ctx.padding = (norm.eps, norm.mean is not None), padding
        ctx.mark_non_differentiable(*statistics)
        return y, *statistics

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, u, taps, bias, weight, shift, *statistics = ctx.saved_tensors
        if formulas.by_formula():

            def formula(x: Tensor, taps: Tensor, *rest: Any) -> Tensor:
                u = formulas.depthwise(x, taps, None, ctx.padding)
                return x + formulas.gelu_norm(u, *rest, *statistics, *ctx.sizes)

            return *formulas.differentiate(formula, (x, taps, bias, weight, shift), (dy,)), None, None
        dy = _channels_last(dy)
        du, *of_norm = _normalise_backward(u, bias, weight, statistics, dy, *ctx.sizes)
        wanted = (*ctx.needs_input_grad[:2], False)
        dx, dtaps, _none = _convolve_backward(x, taps, du, dy, ctx.padding, wanted, in_place=True)
        return dx, dtaps, *of_norm, None, None
