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
from espalier.nn.kernels.library import call, fresh
from espalier.nn.precision import differentiable

Padding = tuple[int, int, int, int]  # rows of zeros above and below, columns left and right


class Norm(NamedTuple):
    """What batch norm does: scale γ, shift β, ε, and the statistics if they are given, not taken from the rows."""

    weight: Tensor
    shift: Tensor
    eps: float
    mean: Tensor | None
    variance: Tensor | None


def _channels_last(x: Tensor) -> Tensor:
    return x.resolve_neg().contiguous(memory_format=torch.channels_last)


def _new_map(like: Tensor, batch: int, channels: int, height: int, width: int) -> Tensor:
    """Return room for a channels-last map.

    It is no view of what it was made from: torch would refuse to let one that a function returns be changed in place.
    """
    return fresh(like, batch, height, width, channels).permute(0, 3, 1, 2).data


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


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: Padding, norm: Norm | None = None,
    moments: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the convolution c, or with a norm of given statistics ``x + norm(GELU(c))``.

    ``moments`` (B, 2, C) is filled with GELU(c)'s mean over each image, and the sum of squares about it.
    """
    sizes = _sizes(x, weight, padding)
    y = _new_map(x, len(x), x.shape[1], sizes["out_height"], sizes["out_width"])
    after = dict.fromkeys(Norm._fields) | {"eps": 0.0} if norm is None else norm._asdict()
    call(
        DEPTHWISE_FORWARD, x.dtype, x=x, filters=weight.contiguous(), bias=bias, **after, y=y, moments=moments, **sizes
    )
    return y


def _convolve_backward(
    x: Tensor, weight: Tensor, dy: Tensor, padding: Padding, wanted: tuple[bool, bool, bool],
    after: dict[str, Any] | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients of x, weight and bias, None where they are not wanted.

    ``after`` holds what the kernel takes of a batch norm after GELU and of its gradient, and then x is added to y.
    """
    dx = _new_map(x, *x.shape) if wanted[0] else None
    dfilters = torch.empty_like(weight, memory_format=torch.contiguous_format) if wanted[1] else None
    dbias = weight.new_empty(len(weight)) if wanted[2] else None
    tensors = {"x": x, "dy": dy, "filters": weight.contiguous(), "dx": dx, "dfilters": dfilters, "dbias": dbias}
    call(DEPTHWISE_BACKWARD, x.dtype, **tensors, **_sizes(x, weight, padding), **(after or _NO_NORM))
    return dx, dfilters, dbias


_NO_NORM = dict.fromkeys(("u", "weight", "mean", "variance", "dweight", "dshift")) | {"eps": 0.0, "fixed": False}


def _norm_sizes(u: Tensor, eps: float, fixed: bool) -> dict[str, Any]:
    return {"eps": eps, "rows": u.numel() // max(1, u.shape[1]), "channels": u.shape[1], "fixed": fixed}


def _normalise(
    u: Tensor, residual: Tensor | None, bias: Tensor | None, norm: Norm, moments: Tensor | None = None, *,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (γ·(GELU(u + bias) − μ)/σ + β + residual, μ, σ²), the first in the memory of u if ``in_place``.

    ``moments`` are those of ``_convolve``, where they are known.
    """
    y = u if in_place else _new_map(u, *u.shape)
    mean, variance = (norm.weight.new_empty(u.shape[1]) if t is None else t for t in (norm.mean, norm.variance))
    tensors = {"u": u, "residual": residual, "bias": bias, "weight": norm.weight, "shift": norm.shift}
    tensors |= {"moments": moments, "y": y, "mean": mean, "variance": variance}
    sizes = _norm_sizes(u, norm.eps, norm.mean is not None)
    call(GELU_NORM_FORWARD, u.dtype, **tensors, **sizes, parts=0 if moments is None else len(moments))
    return y, mean, variance


def _normalise_backward(
    u: Tensor, bias: Tensor | None, weight: Tensor, statistics: Sequence[Tensor], dy: Tensor, *sizes: Any,
    du: Tensor | None,
) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of (bias, γ, β) and write that of u; the sizes are ε and whether statistics were given."""
    dbias, dweight, dshift = (weight.new_empty(u.shape[1]) for _ in range(3))
    inputs = {"u": u, "dy": dy, "bias": bias, "weight": weight, "mean": statistics[0], "variance": statistics[1]}
    outputs = {"du": du, "dbias": dbias, "dweight": dweight, "dshift": dshift}
    call(GELU_NORM_BACKWARD, u.dtype, **inputs, **outputs, **_norm_sizes(u, *sizes))
    return None if bias is None else dbias, dweight, dshift


def _rows(map_BCHW: Tensor) -> Tensor:
    """Return the pixels (B·H·W, C) of a channels-last map."""
    return map_BCHW.permute(0, 2, 3, 1).reshape(-1, map_BCHW.shape[1])


def _multiply(x: Tensor, weight: Tensor) -> Tensor:
    """Return the map of weight·x at each pixel."""
    rows = _rows(x)
    y = torch.mm(rows, weight.t(), out=fresh(x, len(rows), len(weight)))
    return y.view(len(x), *x.shape[2:], len(weight)).permute(0, 3, 1, 2)


def gelu_norm(u: Tensor, bias: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y, μ, σ²) of batch norm after GELU of u + bias, and overwrite u if no gradient is wanted."""
    if differentiable(u, bias, norm.weight, norm.shift):
        return _GeluNorm.apply(_channels_last(u), bias, norm.weight, norm.shift, norm)
    return _normalise(_channels_last(u), None, bias, norm, in_place=True)


def mix(x: Tensor, taps: Tensor, bias: Tensor | None, norm: Norm, padding: Padding) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y, μ, σ²) with y = x + batch norm of GELU of (x convolved with the taps + bias)."""
    if differentiable(x, taps, bias, norm.weight, norm.shift):
        return _Mix.apply(_channels_last(x), taps, bias, norm.weight, norm.shift, norm, padding)
    x = _channels_last(x)
    if norm.mean is not None and norm.variance is not None:
        return _convolve(x, taps, bias, padding, norm), norm.mean, norm.variance
    moments = taps.new_empty(x.shape[0], 2, x.shape[1])
    return _normalise(_convolve(x, taps, bias, padding, None, moments), x, None, norm, moments, in_place=True)


def point(x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y, μ, σ²) of batch norm after GELU of weight·x + bias at each pixel, weight (C', C) of x's dtype."""
    if differentiable(x, weight, bias, norm.weight, norm.shift):
        return _Point.apply(_channels_last(x), weight, bias, norm.weight, norm.shift, norm)
    return _normalise(_multiply(_channels_last(x), weight), None, bias, norm, in_place=True)


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, padding: Padding) -> Tensor:
    """Return the depthwise convolution of x with ``weight`` (C, 1, R, S), stride 1, in a frame of zeros."""
    y: Tensor = _Depthwise.apply(_channels_last(x), weight, bias, padding)
    return y


# These take channels-last maps and keep them as they were given, so that second derivatives find the way on and
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
        return *_convolve_backward(x, weight, _channels_last(dy), ctx.padding, wanted), None


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
        du = _new_map(u, *u.shape)
        return du, *_normalise_backward(u, bias, weight, statistics, _channels_last(dy), *ctx.sizes, du=du), None


class _Point(torch.autograd.Function):
    """ConvMixer's mixing of channels, (``BN(GELU(weight·x + bias))``, μ, σ²); x and the product are kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, norm: Norm
    ) -> tuple[Tensor, ...]:
        u = _multiply(x, weight)
        y, *statistics = _normalise(u, None, bias, norm)
        ctx.save_for_backward(x, u, weight, bias, scale, shift, *statistics)
        ctx.sizes = norm.eps, norm.mean is not None
        ctx.mark_non_differentiable(*statistics)
        return y, *statistics

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, u, weight, bias, scale, shift, *statistics = ctx.saved_tensors
        if formulas.by_formula():

            def formula(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
                product = torch.nn.functional.conv2d(x, weight[:, :, None, None])
                return formulas.gelu_norm(product, *rest, *statistics, *ctx.sizes)

            return *formulas.differentiate(formula, (x, weight, bias, scale, shift), (dy,)), None
        du = _new_map(u, *u.shape)
        of_norm = _normalise_backward(u, bias, scale, statistics, _channels_last(dy), *ctx.sizes, du=du)
        dx = _multiply(du, weight.t()) if ctx.needs_input_grad[0] else None
        dweight = torch.mm(_rows(du).t(), _rows(x)) if ctx.needs_input_grad[1] else None
        return dx, dweight, *of_norm, None


class _Mix(torch.autograd.Function):
    """ConvMixer's mixing of pixels, (``x + BN(GELU(depthwise(x) + bias))``, μ, σ²); x and the convolution are kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, taps: Tensor, bias: Tensor | None, weight: Tensor, shift: Tensor, norm: Norm,
        padding: Padding,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        moments = taps.new_empty(x.shape[0], 2, x.shape[1]) if norm.mean is None else None
        u = _convolve(x, taps, bias, padding, None, moments)
        y, *statistics = _normalise(u, x, None, norm, moments)
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
        _none, dweight, dshift = _normalise_backward(u, None, weight, statistics, dy, *ctx.sizes, du=None)
        after = {"u": u, "weight": weight, "mean": statistics[0], "variance": statistics[1]}
        after |= {"dweight": dweight, "dshift": dshift, "eps": ctx.sizes[0], "fixed": ctx.sizes[1]}
        of_convolution = _convolve_backward(x, taps, dy, ctx.padding, ctx.needs_input_grad[:3], after)
        return *of_convolution, dweight, dshift, None, None
