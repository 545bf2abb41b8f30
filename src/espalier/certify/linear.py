"""Rules of linear maps with constant weights, and of pooling; c is the number of windows that can cover one input.

| operation | constant |
|---|---|
| linear, product with a matrix | spectral norm, from float64 |
| convolution and its transpose | ``kernel_norm``, for every image size |
| average and maximum pooling | √(c·K)/divisor over windows of K inputs; √c |
| sum, mean, maximum over axes of K | √K; 1/√K; 1 |
| batch norm in evaluation | max |γ| / √(var + ε) |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from espalier.certify.arithmetic import (
    gamma,
    orthogonal_norm,
    per_axis,
    root_up,
    spread_norm,
    tensor_norm,
    unit,
    up,
    windows,
)
from espalier.certify.bounded import Analysis
from espalier.certify.operations import operation
from espalier.certify.refusal import UncertifiableError
from espalier.certify.value import Bound, Rows, Term
from espalier.nn.lipschitz.constant import kernel_norm, spectral_norm


def finite(norm: float) -> float:
    """Return the norm of a map, or refuse one that is not finite."""
    if not math.isfinite(norm):
        raise UncertifiableError(f"its constant is {norm}: are its weights finite?")
    return norm


def affine(
    analysis: Analysis,
    x: Bound,
    value: Tensor | None,
    *,
    norm: float,
    size: float,
    terms: int,
    bias: Tensor | None,
    rows: Rows | None = None,
    peak: float = 0.0,
) -> Bound:
    """Return the bound of Wx + b.

    Args:
        analysis: the analysis.
        x: the operand.
        value: what was computed.
        norm: of W.
        size: of the map with the absolute values of W: what γₙ multiplies. The Frobenius norm is one.
        terms: n, how many products one number of the result sums.
        bias: b, one number per channel.
        rows: the map, if it is the network's last one.
        peak: norm of what is summed before it is divided, where that is larger.
    """
    finite(norm)
    if value is None:
        return Bound(None, up(norm, x.lipschitz))
    rounding, added = gamma(terms + 1, value.dtype), 0.0 if bias is None else spread_norm(bias, value)
    flushed = torch.finfo(value.dtype).tiny * terms * math.sqrt(value[0].numel())
    term = Term(x, norm, up(rounding, max(norm, size)), max(norm, size, peak))
    return analysis.combine(value, [term], constant=added, absolute=rounding * added + flushed, rows=rows)


def _matrix_norm(weight: Tensor) -> float:
    # Most large matrices here are orthogonal: one product tells, where singular values take many.
    if min(weight.shape) >= 64 and (norm := orthogonal_norm(weight[None])) < 1.0005:
        return norm
    return spectral_norm(weight)


@operation("F.linear")
def linear(analysis: Analysis, input: Bound, weight: Tensor, bias: Tensor | None = None) -> Bound:
    """The spectral norm of the weights."""
    if input.value is not None and input.value.ndim < 2:
        raise UncertifiableError("it maps the batch: give one row per image")
    value = input.apply(F.linear, weight, bias)
    analysis.try_products("linear", F.linear, input.value, weight, weight.ndim == 2)
    # Copies: the network may write to what it gave before the bound is read.
    copied = None if bias is None else bias.detach().clone()
    rows = Rows(input, weight.detach().clone(), copied) if weight.ndim == 2 else None
    norm = analysis.norms.of(_matrix_norm, weight if weight.ndim == 2 else weight[None])
    return affine(
        analysis, input, value, norm=norm, size=analysis.norms.of(tensor_norm, weight), terms=weight.shape[-1],
        bias=bias, rows=rows if value is not None and value.ndim == 2 else None,
    )  # fmt: skip


@operation("matmul", "torch.Tensor.__matmul__", "mm")
def product(analysis: Analysis, input: Bound, other: Tensor) -> Bound:
    """x·W, by the rule of linear."""
    if not isinstance(other, Tensor) or other.ndim != 2:
        raise UncertifiableError("only products with a constant matrix have a rule")
    return linear(analysis, input, other.mT)


def _axes(name: str, input: Bound) -> int:
    """Return how many axes of pixels an operation has, as its name tells."""
    axes = next(int(digit) for digit in name if digit.isdigit())
    if input.value is not None and input.value.ndim != axes + 2:
        raise UncertifiableError(f"it takes the batch for channels: give (B, C, …) with {axes} axes of pixels")
    return axes


class _Convolution(NamedTuple):
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1


class _Transposed(NamedTuple):
    stride: Any = 1
    padding: Any = 0
    output_padding: Any = 0
    groups: int = 1
    dilation: Any = 1


@operation(*(f"{place}.conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3) for place in ("F", "torch")))
def convolution(
    analysis: Analysis, name: str, input: Bound, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
) -> Bound:
    """The least of the bounds of ``kernel_norm``; the transpose has the norm of the convolution."""
    axes, function, transposed = _axes(name, input), getattr(F, name), "transpose" in name
    settings = _Transposed(*args, **kwargs) if transposed else _Convolution(*args, **kwargs)
    value = input.apply(function, weight, bias, *settings)
    bilinear = lambda x, w: function(x, w, None, *settings)  # noqa: E731
    analysis.try_products((name, settings), bilinear, input.value, weight, not transposed)
    taps = math.prod(weight.shape[2:])
    plain = set(per_axis(settings.dilation, axes)) == {1}
    cover = windows(weight.shape[2:], per_axis(settings.stride, axes)) if plain else None
    # One number sums all taps of the channels it sees, and in a transpose only those of its own phase.
    terms = taps * (weight.shape[0] // settings.groups if transposed else weight.shape[1])
    return affine(
        analysis, input, value, norm=analysis.norms.of(kernel_norm, weight, settings.groups, cover),
        size=analysis.norms.of(kernel_norm, weight.abs(), settings.groups), terms=terms, bias=bias,
    )  # fmt: skip


def _windows(name: str, input: Bound, kernel_size: Any, stride: Any) -> tuple[int, int]:
    """Return of pooling over how many inputs it goes, and how many windows can cover one."""
    axes = _axes(name, input)
    kernel = per_axis(kernel_size, axes)
    # torch takes an empty list, like None, for windows side by side.
    given = stride is not None and not (isinstance(stride, Sequence) and not stride)
    return math.prod(kernel), windows(kernel, per_axis(stride, axes) if given else kernel)


@operation(*(f"{place}.avg_pool{axes}d" for axes in (1, 2, 3) for place in ("F", "torch")))
def average_pooling(
    analysis: Analysis,
    name: str,
    input: Bound,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Bound:
    """√(c·K)/divisor, which is 1/√K without overlap."""
    inputs, cover = _windows(name, input, kernel_size, stride)
    if ceil_mode or (any(per_axis(padding, 1)) and not count_include_pad):
        raise UncertifiableError("windows at the border are averaged over fewer pixels: use ScaledAvgPool2d")
    divisor, summed = abs(divisor_override or inputs), root_up(cover * inputs)
    norm = summed / divisor
    norm = norm if norm * divisor == summed else math.nextafter(norm, math.inf)
    extra = () if divisor_override is None else (divisor_override,)
    value = input.apply(getattr(F, name), kernel_size, stride, padding, ceil_mode, count_include_pad, *extra)
    return affine(analysis, input, value, norm=norm, size=norm, terms=inputs + 2, bias=None, peak=summed)


@operation(*(f"{place}.max_pool{axes}d" for axes in (1, 2, 3) for place in ("F", "torch")),
           *(f"F.max_pool{axes}d_with_indices" for axes in (1, 2, 3)))  # fmt: skip
def max_pooling(
    analysis: Analysis,
    name: str,
    input: Bound,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Bound:
    """√c, which is 1 without overlap: a pixel can be the largest of c windows."""
    if return_indices:
        raise UncertifiableError("it returns indices: set return_indices=False")
    inputs, cover = _windows(name, input, kernel_size, stride)
    function = getattr(F, name.removesuffix("_with_indices"))
    value = input.apply(function, kernel_size, stride, padding, dilation, ceil_mode)
    return analysis.exact(input, value, root_up(cover if set(per_axis(dilation, 1)) == {1} else inputs))


@operation(*(f"F.adaptive_{kind}_pool{axes}d" for axes in (1, 2, 3) for kind in ("avg", "max")))
def adaptive_pooling(
    analysis: Analysis, name: str, input: Bound, output_size: Any, return_indices: bool = False
) -> Bound:
    """1/√K for averages over K pixels and 1 for maxima, where all windows are alike."""
    size = per_axis(output_size, _axes(name, input))
    if return_indices:
        raise UncertifiableError("it returns indices: set return_indices=False")
    if input.value is None:
        if set(size) != {1}:
            raise UncertifiableError("its windows depend on the image size: give an example=")
        return Bound(None, input.lipschitz)
    sides = input.value.shape[2:]
    if any(goal is not None and (goal < 1 or side % goal) for side, goal in zip(sides, size, strict=True)):
        raise UncertifiableError("its windows overlap or differ in size: choose an output that divides the image")
    value = getattr(F, name)(input.value, output_size)
    if "max" in name:
        return analysis.exact(input, value)
    inputs = math.prod(sides) // math.prod(value.shape[2:])
    norm = math.nextafter(1 / math.sqrt(inputs), 1.0) if inputs > 1 else 1.0
    return affine(analysis, input, value, norm=norm, size=norm, terms=inputs + 2, bias=None, peak=math.sqrt(inputs))


def _axes_of(input: Bound, dim: Any) -> tuple[int, ...]:
    """Return the axes of a reduction, counted from the front; the batch is not among them."""
    ndim = input.numbers.ndim
    axes = range(ndim) if dim is None else ([dim] if isinstance(dim, int) else list(dim) or range(ndim))
    found = tuple(axis % ndim for axis in axes)
    if 0 in found:
        raise UncertifiableError("it reduces the batch, so that images would meet: name the other axes")
    return found


@operation("sum", "mean", "amax", "amin")
def reduction(analysis: Analysis, name: str, input: Bound, dim: Any = None, keepdim: bool = False) -> Bound:
    """√K for a sum over K numbers, 1/√K for their mean, 1 for the largest or the smallest."""
    axes = _axes_of(input, dim)
    value = getattr(input.numbers, name)(axes, keepdim)
    if name in ("amax", "amin"):
        return analysis.exact(input, value)
    count = math.prod(input.numbers.shape[axis] for axis in axes)
    norm = root_up(count) if name == "sum" else math.nextafter(1 / math.sqrt(max(1, count)), math.inf)
    peak = math.sqrt(count) * (1 + 1e-15)
    return affine(analysis, input, value, norm=norm, size=norm, terms=count + 2, bias=None, peak=peak)


def batch_norm_scale(var: Tensor | None, weight: Tensor | None, eps: float, training: bool) -> Tensor:
    """Return γ / √(var + ε) in float64."""
    if training or var is None:
        raise UncertifiableError("batch norm mixes the images of a batch in training mode: call eval() first")
    if bool((var.detach() < 0).any()):  # ε, rounded, would have to be taken from it
        raise UncertifiableError("its running variance is negative: load the right statistics")
    scale = (var.detach().double() + eps).rsqrt()
    return scale if weight is None else scale * weight.detach().double()


@operation("F.batch_norm")
def batch_norm(
    analysis: Analysis,
    input: Bound,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Bound:
    """The largest |γ| / √(var + ε)."""
    scale = batch_norm_scale(running_var, weight, eps, training)
    norm = finite(scale.abs().max().item() * (1 + 1e-14))
    if input.value is None:
        return Bound(None, up(norm, input.lipschitz))
    if running_var is not None and not bool((running_var.detach() + eps >= torch.finfo(running_var.dtype).tiny).all()):
        raise UncertifiableError("its variance and ε are too small for the precision that runs: raise eps")
    value = F.batch_norm(input.value, running_mean, running_var, weight, bias, False, momentum, eps)
    moved = torch.zeros_like(scale) if running_mean is None else running_mean.detach().double().abs() * scale.abs()
    moved = moved if bias is None else moved + bias.detach().double().abs()
    added, u = spread_norm(moved, value), 16 * unit(value.dtype)
    return analysis.combine(value, [Term(input, norm, u * norm)], constant=added, absolute=u * added)
