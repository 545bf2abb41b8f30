"""Rules of operations on single numbers: sums, products with constants, activations.

Rounding is charged per number: one unit for each of the steps, and a few for elementary functions, whose libraries
(SLEEF, MKL, libm) promise one to four units in the last place.
"""

from __future__ import annotations

import builtins
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from espalier.certify.arithmetic import spread_norm, unit, up
from espalier.certify.bounded import Analysis
from espalier.certify.linear import reduction
from espalier.certify.operations import operation
from espalier.certify.refusal import UncertifiableError
from espalier.certify.shapes import Sorted
from espalier.certify.value import Bound, Term

_ELEMENTARY = 16
"""Units of rounding that an activation made of elementary functions is charged with."""


def _spread(result: Tensor, operand: Tensor) -> float:
    """Return how many numbers of the result come from one of the operand: √ of it is what broadcasting costs."""
    return result.numel() / max(1, operand.numel())


def _keeps_batch(result: Tensor, *operands: Tensor) -> None:
    """Refuse a result in which an image meets other images, or a constant that differs between images."""
    if any(operand.ndim != result.ndim or len(operand) != len(result) for operand in operands):
        raise UncertifiableError("it broadcasts along the batch, so that images would meet")


def _constant(x: Bound, other: Any) -> Any:
    """Return a number or a constant tensor that combines with x image by image."""
    if isinstance(other, Tensor):
        if not (other.is_floating_point() or other.dtype in (torch.int64, torch.int32, torch.uint8)):
            raise UncertifiableError(f"a constant of {other.dtype} has no rule")
        other = other.detach()
        if x.value is not None and not other.is_floating_point():
            other = other.to(x.value.dtype)  # as torch does before it computes
        if x.value is None and other.numel() > 1:
            raise UncertifiableError("how a constant broadcasts depends on the size of its input: give an example=")
        if x.value is not None and (
            other.ndim > x.value.ndim or (other.ndim == x.value.ndim and len(other) not in (0, 1))
        ):
            raise UncertifiableError("a constant that differs from image to image is added or multiplied")
    elif not isinstance(other, int | float) or isinstance(other, bool):
        raise UncertifiableError(f"an operand of type {type(other).__name__} has no rule")
    return other


@operation("add", "torch.Tensor.__add__", "torch.Tensor.__radd__", "sub", "subtract", "torch.Tensor.__sub__", "rsub",
           "torch.Tensor.__rsub__", values=2)  # fmt: skip
def add(analysis: Analysis, name: str, input: Any, other: Any, *, alpha: float = 1) -> Bound:
    """x ± α·y, each a value or a constant: constants add, and broadcasting multiplies by the root of the copies."""
    values = [operand for operand in (input, other) if isinstance(operand, Bound)]
    if len(values) == 2 and (values[0].value is None or values[1].value is None):
        raise UncertifiableError("how its operands broadcast depends on their size: give an example=")
    alpha = -alpha if "sub" in name else alpha
    operands = [x if isinstance(x, Bound) else _constant(values[0], x) for x in (input, other)]
    if "rsub" in name:  # y − α·x
        operands.reverse()
    if values[0].value is None:
        return Bound(None, up(1.0 if operands[0] is values[0] else abs(alpha), values[0].lipschitz))
    first, second = (x.numbers if isinstance(x, Bound) else x for x in operands)
    value = first + alpha * second
    _keeps_batch(value, *(x.numbers for x in values))
    terms, added, u = [], 0.0, 3 * unit(value.dtype)
    for operand, weight in zip(operands, (1.0, abs(alpha)), strict=True):
        if isinstance(operand, Bound):
            factor = up(weight, math.sqrt(_spread(value, operand.numbers)))
            terms.append(Term(operand, factor, u * factor))
        else:
            added += weight * spread_norm(torch.as_tensor(operand, dtype=torch.float64), value)
    return analysis.combine(value, terms, constant=added, absolute=u * added)


def _is_constant(x: Bound) -> bool:
    """Return whether a value is a constant, exact and the same for every image."""
    return x.is_constant and x.error is not None and not x.error.any()


@operation("mul", "multiply", "torch.Tensor.__mul__", "torch.Tensor.__rmul__", "div", "divide", "true_divide",
           "torch.Tensor.__truediv__", "torch.Tensor.__div__", values=2)  # fmt: skip
def multiply(analysis: Analysis, name: str, input: Any, other: Any, *, rounding_mode: str | None = None) -> Bound:
    """c·x: the largest |c|; x / c: one over the smallest |c|. A product of two values has no constant."""
    inverse, x, c = "div" in name, input, other
    if not inverse and (not isinstance(x, Bound) or (isinstance(c, Bound) and _is_constant(x))):
        x, c = c, x
    if not isinstance(x, Bound) or rounding_mode is not None:
        raise UncertifiableError("a constant divided by a value, or a quotient that is cut, has no constant")
    if isinstance(c, Bound) and _is_constant(c) and c.numbers.ndim == x.numbers.ndim:
        c = c.numbers[:1]
    if isinstance(c, Bound):
        raise UncertifiableError("a product or quotient of two values that depend on the image has no constant")
    c = _constant(x, c)
    if not isinstance(c, Tensor) and x.value is not None:
        as_given(c, x.value.dtype)
    sizes = c.double().abs() if isinstance(c, Tensor) else torch.tensor(abs(c), dtype=torch.float64)
    largest = (1.0 / sizes if inverse else sizes).max().item() if sizes.numel() else 0.0
    largest = up(largest, 1 + 2.0**-50) if inverse and largest != 1.0 else largest
    flushed = inverse and x.value is not None and bool((sizes < torch.finfo(x.value.dtype).tiny).any())
    if flushed or not math.isfinite(largest):
        raise UncertifiableError(
            f"its factor goes up to {largest}: are its constants finite, and neither zero nor denormal?"
        )
    if x.value is None:
        return Bound(None, up(largest, x.lipschitz))
    value = x.value / c if inverse else x.value * c
    _keeps_batch(value, x.value)
    factor = up(largest, math.sqrt(_spread(value, x.value)))
    return analysis.combine(value, [Term(x, factor, up(3 * unit(value.dtype), factor))])


def as_given(number: float, dtype: torch.dtype) -> None:
    """Refuse a number that a dtype holds as none, as infinity or with fewer digits: it is not the one that runs."""
    held = abs(torch.tensor(float(number), dtype=torch.float64).to(dtype).item())
    limits = torch.finfo(dtype)
    if number and not limits.tiny <= held <= limits.max:
        raise UncertifiableError(f"{number:g} is {held:g} in {dtype}: choose a factor that it can hold")


@operation("lerp", values=2)
def interpolate(analysis: Analysis, input: Any, end: Any, weight: Any) -> Bound:
    """(1 − w)·x + w·y for one number w: |1 − w|·L(x) + |w|·L(y)."""
    if isinstance(weight, Tensor):
        if weight.numel() != 1:
            raise UncertifiableError("a weight for every number has no rule: give one for all of them")
        share = weight.detach().double().item()
    else:
        share = float(weight)
    if not (isinstance(input, Bound) and isinstance(end, Bound)):
        raise UncertifiableError("it needs two values that depend on the image")
    value = torch.lerp(input.numbers, end.numbers, weight)
    _keeps_batch(value, input.numbers, end.numbers)
    shares, u = (abs(1 - share) * (1 + 2.0**-50), abs(share)), unit(value.dtype)
    terms = []
    for operand, own in zip((input, end), shares, strict=True):
        spread = math.sqrt(_spread(value, operand.numbers))
        # x + w(y − x): the difference, the product and the sum round numbers of either operand, times |w| or |1 − w|.
        terms.append(Term(operand, up(own, spread), up(8 * u, sum(shares), spread), up(2 * sum(shares), spread)))
    return analysis.combine(value, terms)


@operation("maximum", "fmax", "max", "minimum", "fmin", "min", values=2)
def choose(
    analysis: Analysis, name: str, input: Any, other: Any = None, keepdim: bool = False, *, dim: int | None = None
) -> Bound | Sorted:
    """The larger or smaller of two numbers: of two values, no more than both change together. Along an axis: 1."""
    axis = other if dim is None else dim
    if name in ("max", "min") and type(axis) is int:
        return Sorted(reduction(analysis, f"a{name}", input, axis, keepdim))
    if not isinstance(input, Bound):
        input, other = other, input
    second = other.numbers if isinstance(other, Bound) else _constant(input, other)
    if not isinstance(second, Tensor):
        raise UncertifiableError("it takes a tensor, or an axis: use clamp for a number")
    values = [operand for operand in (input, other) if isinstance(operand, Bound)]
    value = (torch.maximum if "max" in name else torch.minimum)(input.numbers, second)
    _keeps_batch(value, *(x.numbers for x in values))
    return analysis.combine(value, [Term(x, math.sqrt(_spread(value, x.numbers))) for x in values], joint=True)


def activation(*names: str, slope: Any = 1.0, units: float = 0.0, offset: Any = 0.0) -> None:
    """Enter the rule of a function of one number.

    Args:
        names: see ``operation``.
        slope: the largest one, or a function of the other arguments that returns it.
        units: of rounding, relative to slope·|x| + offset; 0 if the result is a number of the input, or 0.
        offset: size of the result near 0, or a function of the other arguments that returns it.
    """

    @operation(*names)
    def rule(analysis: Analysis, name: str, input: Bound, *args: Any, inplace: bool = False, **kwargs: Any) -> Bound:
        if any(isinstance(arg, Tensor | Bound) for arg in (*args, *kwargs.values())):
            raise UncertifiableError("it takes numbers: tensors in their place have no rule")
        steepest = float(slope(*args, **kwargs) if callable(slope) else slope)
        if not math.isfinite(steepest):
            raise UncertifiableError(f"its slope goes up to {steepest}: are its constants finite?")
        name = name.strip("_")
        value = input.apply(getattr(torch, name, None) or getattr(F, name), *args, **kwargs)
        if not units or value is None:
            return analysis.exact(input, value, steepest)
        size = float(offset(*args, **kwargs) if callable(offset) else offset) * math.sqrt(value[0].numel())
        u = units * unit(value.dtype)
        return analysis.combine(value, [Term(input, steepest, up(u, max(1.0, steepest)))], absolute=u * size)


activation("neg", "negative", "torch.Tensor.__neg__")
activation("abs", "absolute", "torch.Tensor.__abs__")
activation("relu", "F.relu")
activation("F.relu6")


def _limits(*limits: float | None) -> float:
    """Return the size of what a result may be cut off at: an infinite limit is never met."""
    return builtins.max((abs(limit) for limit in limits if limit is not None and math.isfinite(limit)), default=0.0)


activation("F.hardtanh", units=1, offset=lambda min_val=-1.0, max_val=1.0: _limits(min_val, max_val))
activation("clamp", "clip", units=1, offset=lambda min=None, max=None: _limits(min, max))
activation("clamp_min", units=1, offset=lambda min: _limits(min))
activation("clamp_max", units=1, offset=lambda max: _limits(max))
activation("F.leaky_relu", slope=lambda negative_slope=0.01: builtins.max(1.0, abs(negative_slope)), units=3)
activation("F.softshrink", units=3, offset=lambda lambd=0.5: abs(lambd))
activation("F.softsign", units=4)
activation("F.hardsigmoid", slope=0.1667, units=8, offset=1.0)
activation("F.hardswish", slope=1.5, units=16, offset=1.0)
activation("tanh", "F.tanh", units=_ELEMENTARY)
activation("sigmoid", "F.sigmoid", slope=0.25, units=_ELEMENTARY, offset=1.0)
activation("F.logsigmoid", units=_ELEMENTARY, offset=1.0)
activation("F.tanhshrink", units=_ELEMENTARY)
activation("sin", units=_ELEMENTARY, offset=1.0)
activation("cos", units=_ELEMENTARY, offset=1.0)
activation("atan", "arctan", units=_ELEMENTARY)
activation("F.elu", slope=lambda alpha=1.0: builtins.max(1.0, abs(alpha)), units=_ELEMENTARY,
           offset=lambda alpha=1.0: abs(alpha))  # fmt: skip
# The largest slopes of the others, rounded up in the last digit that is given.
activation("F.selu", "torch.selu", slope=1.7581, units=_ELEMENTARY, offset=2.0)
activation("F.gelu", slope=1.13, units=_ELEMENTARY, offset=1.0)
activation("F.silu", slope=1.1, units=_ELEMENTARY, offset=1.0)
activation("F.mish", slope=1.09, units=_ELEMENTARY, offset=1.0)


@operation("prelu", "F.prelu")
def prelu(analysis: Analysis, input: Bound, weight: Tensor) -> Bound:
    """The largest of 1 and |slope|."""
    sizes = weight.detach().double().abs()
    steepest = max(1.0, sizes.max().item())
    if not bool(sizes.isfinite().all()):
        raise UncertifiableError(f"its slope goes up to {steepest}: are its weights finite?")
    if input.value is None:
        return analysis.exact(input, None, steepest)
    value = F.prelu(input.value, weight)
    return analysis.combine(value, [Term(input, steepest, 3 * unit(value.dtype) * steepest)])


@operation("F.dropout", "F.dropout1d", "F.dropout2d", "F.dropout3d", "F.alpha_dropout", "F.feature_alpha_dropout",
           alias=True)  # fmt: skip
def dropout(
    analysis: Analysis, name: str, input: Bound, p: float = 0.5, training: bool | None = None, inplace: bool = False
) -> Bound:
    """Nothing in evaluation mode."""
    if p > 0 and (("alpha" not in name) if training is None else training):  # as torch has it where it is not stated
        raise UncertifiableError("dropout draws at random in training mode: call eval() first")
    return input
