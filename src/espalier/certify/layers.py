"""Rules of whole layers: ours, whose kernels the rules of operations cannot follow, and some of torch's.

| layer | constant |
|---|---|
| CayleyLinear, CayleyConv | √(1 + ‖QᴴQ − I‖), of the operator that runs |
| MaxMin, Householder, ScaledAvgPool2d, L2Pool2d, BatchCentering (evaluation) | 1 |
| Conv1d/2d/3d | ``kernel_norm``, times the constant of the padding |
| BatchNorm (evaluation) | max |γ| / √(var + ε) |
| CircularPad | √(how often one pixel can appear in the padded image) |

The rounding of an orthogonal convolution is charged step by step: both transforms, the product at every frequency, the
bias. Their reference is the map x ↦ F⁻¹Q̂Fx with the spectrum Q̂ as it is kept, so what its construction lost is in
‖Q̂ᴴQ̂ − I‖.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from espalier.certify import code
from espalier.certify.arithmetic import (
    gamma,
    orthogonal_norm,
    orthogonality_excess,
    root_up,
    spread_norm,
    tensor_norm,
    unit,
    up,
    windows,
)
from espalier.certify.bounded import Analysis
from espalier.certify.linear import affine, batch_norm_scale, finite, linear
from espalier.certify.refusal import UncertifiableError
from espalier.certify.shapes import padding_factor
from espalier.certify.value import Bound, Term
from espalier.errors import EspalierError
from espalier.nn.lipschitz.activations import Householder, MaxMin
from espalier.nn.lipschitz.constant import kernel_norm
from espalier.nn.lipschitz.normalisation import BatchCentering
from espalier.nn.lipschitz.pooling import L2Pool2d, ScaledAvgPool2d
from espalier.nn.orthogonal.conv import CayleyConv1d, CayleyConv2d, CayleyConv3d, CayleyConvTranspose2d
from espalier.nn.orthogonal.linear import CayleyLinear, orthogonal_matrix

Forward = Callable[[Tensor], Tensor]

Rule = Callable[[Any], float | None]

Rounding = Callable[[Any, float], tuple[float, float]]


class Layer(NamedTuple):
    """The rule of a layer class."""

    function: Callable[[Analysis, Any, Bound, Forward], Bound]
    alias: bool
    """Whether the result may share its numbers with the input."""


class Statement(NamedTuple):
    """The constant of a layer class, and what its rounding adds; see ``register_lipschitz``."""

    constant: Rule
    rounding: Rounding | None


RULES: dict[type[nn.Module], Layer | Statement] = {}


def layer(*classes: type[nn.Module], alias: bool = False) -> Callable[[Callable[..., Bound]], Callable[..., Bound]]:
    """Enter the rule of layer classes (decorator)."""

    def enter(function: Callable[..., Bound]) -> Callable[..., Bound]:
        for cls in classes:
            code.record(cls)
            RULES[cls] = Layer(function, alias)
        return function

    return enter


def register_lipschitz(*classes: type[nn.Module], rounding: Rounding | None = None) -> Callable[[Rule], Rule]:
    """Make a function known as the ℓ2 Lipschitz constant of modules of ``classes`` (decorator).

        @register_lipschitz(MyLayer)
        def my_layer(module: MyLayer) -> float:
            return spectral_norm(module.weight)

    The rule is asked with the module at every call, so it sees the present weights and mode; it may raise
    ``UncertifiableError`` with the reason alone, the path is added. It is about the code that the class has now: it
    holds for subclasses that override nothing, and for no class or module that was changed since. It must be about a
    forward pass that leaves its input alone. Your own modules can state their constant themselves instead: see
    ``espalier.nn.lipschitz``. A constant says nothing about rounding: for ``certify``, the operations inside need
    rules, too, or ``rounding`` is stated.

    Args:
        classes: the module classes; a second registration replaces the first.
        rounding: returns (α, β) for a module and the unit roundoff: the forward pass as it runs on x, without
            overflow, is off by at most α·‖x‖ + β. The forward pass is then not looked into.
    """

    for cls in classes:
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise EspalierError(f"register_lipschitz is given {cls!r}: give classes of modules")

    def register(rule: Rule) -> Rule:
        for cls in classes:
            code.record(cls)
            RULES[cls] = Statement(rule, rounding)
        return rule

    return register


@layer(MaxMin)
def permutation(analysis: Analysis, module: nn.Module, x: Bound, forward: Forward) -> Bound:
    """1, and no rounding: numbers of the input in an order that depends on them."""
    return analysis.exact(x, x.apply(forward))


@layer(Householder)
def reflection(analysis: Analysis, module: Householder, x: Bound, forward: Forward) -> Bound:
    """1: continuous, and an isometry on either side of every line.

    Sine and cosine are right to 8 units each, n·z to 16‖z‖, and 2·max(0, n·z)·n to less than 64‖z‖.
    """
    if not bool(module.theta.isfinite().all()):
        raise UncertifiableError("its angles are not finite")
    if module.theta.shape != (module.channels // 2,) or module.channels % 2:
        raise UncertifiableError(f"its angles are {tuple(module.theta.shape)}: one a pair of channels is needed")
    value = x.apply(forward)
    if value is None:
        return analysis.exact(x, None)
    if x.numbers.shape[1] != 2 * len(module.theta):
        raise UncertifiableError(f"its input has {x.numbers.shape[1]} channels and it has {len(module.theta)} pairs")
    return analysis.combine(value, [Term(x, 1.0, 64 * unit(value.dtype), 4.0)])


@layer(L2Pool2d)
def norm_pooling(analysis: Analysis, module: L2Pool2d, x: Bound, forward: Forward) -> Bound:
    """1: norms of parts of the image. Squares may overflow above √max, and vanish below √tiny."""
    _expect(x, 4)
    if x.value is None:
        return analysis.exact(x, None)
    value = forward(x.value)
    limits, rounding = torch.finfo(value.dtype), gamma(module.factor**2 + 4, value.dtype)
    lost = 2 * math.sqrt(limits.tiny * x.value[0].numel())
    return analysis.combine(value, [Term(x, 1.0, rounding, math.sqrt(limits.max))], absolute=lost)


@layer(ScaledAvgPool2d, alias=True)
def scaled_pooling(analysis: Analysis, module: ScaledAvgPool2d, x: Bound, forward: Forward) -> Bound:
    """1: the sum over K pixels divided by √K."""
    _expect(x, 4)
    if x.value is None or module.kernel_size == 1:
        return analysis.exact(x, x.value)
    inputs = math.prod(x.value.shape[2:]) if module.kernel_size is None else module.kernel_size**2
    # The constant 1/√K is itself rounded, which the reference does not undo.
    norm = 1.0 + 8 * unit(x.value.dtype)
    return affine(
        analysis, x, forward(x.value), norm=norm, size=norm, terms=inputs + 6, bias=None, peak=1.01 * math.sqrt(inputs)
    )


@layer(CayleyLinear)
def orthogonal_linear(analysis: Analysis, module: CayleyLinear, x: Bound, forward: Forward) -> Bound:
    """That of a linear map, by the matrix that runs."""
    if x.value is None:
        return _unmeasured(x, module)
    _expect_evaluation(module, x.value)
    return linear(analysis, x, orthogonal_matrix(module, 1, x.value.dtype)[0], module.bias)


@layer(CayleyConv1d, CayleyConv2d, CayleyConv3d, CayleyConvTranspose2d)
def orthogonal_convolution(analysis: Analysis, module: CayleyConv2d, x: Bound, forward: Forward) -> Bound:
    """√(1 + max ‖QᴴQ − I‖) over the frequencies of the operator that runs; padding and cropping only contract."""
    if x.value is None:
        return _unmeasured(x, module)
    _expect_evaluation(module, x.value)
    _expect(x, module.dim + 2)
    value, dtype = forward(x.value), x.value.dtype
    if math.prod(module.kernel_size) == 1:
        q = orthogonal_matrix(module, module.groups, dtype)
        size = max(tensor_norm(matrix) for matrix in q)
        norm, terms = analysis.norms.of(orthogonal_norm, q), max(q.shape[-2:])
        return affine(analysis, x, value, norm=norm, size=size, terms=terms, bias=module.bias)
    side = module.torus(tuple(x.value.shape[2:]))
    planes = module.operator(side, dtype)
    norm, largest = analysis.norms.of(_spectrum_norms, planes)
    finite(norm)
    ways = sum(_transform_rounding(n, dtype) for n in side)
    product = math.sqrt(2) * gamma(2 * planes.shape[-2] + 2, dtype) * largest
    # Forward transform, product, inverse transform: the relative errors of three factors, one after the other.
    relative = ((1 + ways) ** 2 * (1 + product / norm) - 1) * norm * (1 + 1e-12)
    added = 0.0 if module.bias is None else spread_norm(module.bias, value)
    rounding = relative + 4 * unit(dtype) * norm
    peak = norm * math.prod(side) * max(1.0, largest)
    flushed = torch.finfo(dtype).tiny * math.prod(side) * 8 * planes.shape[-1] * math.sqrt(x.value[0].numel())
    return analysis.combine(
        value, [Term(x, norm, rounding, peak)], constant=added, absolute=4 * unit(dtype) * added + flushed
    )


def _transform_rounding(n: int, dtype: torch.dtype) -> float:
    """Return the relative rounding error of a discrete Fourier transform over n points, by matrices or faster.

    A product with the matrix of cosines and sines, ‖·‖_F = n, is off by √2·γ₂ₙ·n·‖x‖, and the transform has norm √n;
    the matrix itself is off by at most 8 units per number. A butterfly is off by less than a few units, and there are
    log₂ n of them. All of that stays below 4(n + 8)·√n units.
    """
    return 4 * (n + 8) * math.sqrt(n) * unit(dtype) if n > 1 else 0.0


def _spectrum_norms(planes: Tensor) -> tuple[float, float]:
    """Return bounds on the largest spectral and the largest Frobenius norm over the frequencies."""
    real, imag = planes.detach().double()
    largest = math.sqrt((real.square() + imag.square()).sum((1, 2)).max().item()) * (1 + 1e-12)
    return root_up(1.0 + orthogonality_excess(real, imag)), largest


_MODERATE = 1e3
"""Up to this |α| an operator is orthogonal to six digits or better, whatever the image size."""


def _unmeasured(x: Bound, module: Any) -> Bound:
    """Return the bound of an exactly orthogonal map: no operator is at hand where the image size is not known."""
    alpha = module.alpha.detach().double().abs().item()
    if not (alpha <= _MODERATE and torch.isfinite(module.weight).all()):
        raise UncertifiableError(
            f"its scale α is {alpha:g}: are its weights finite? Above {_MODERATE:g} it is orthogonal only as far as "
            "rounding lets it, which is measured at one image size: give an example="
        )
    return Bound(None, x.lipschitz)


def _expect_evaluation(module: Any, value: Tensor) -> None:
    if module.training:
        raise UncertifiableError("its operator is not formed in training mode: call eval() first")
    if value.dtype != module.weight.dtype:
        raise UncertifiableError(f"it is given {value.dtype} and has {module.weight.dtype}: use one precision")


def _expect(x: Bound, ndim: int) -> None:
    if x.value is not None and x.value.ndim != ndim:
        raise UncertifiableError(f"its input has {x.value.ndim} dimensions, batch included: {ndim} are needed")


# -- constants of torch's layers that are smaller than what their operations would give one by one, or need no size


@register_lipschitz(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def convolution(module: nn.Conv2d) -> float | None:
    """Return a bound for every image size; see ``kernel_norm``. None with zeros around: its operations tell as much.

    Raises:
        UncertifiableError: circular padding wider than the kernel reaches.
    """
    if module.padding_mode == "zeros":
        return None
    # Around the border of a torus whose side the stride does not divide, a pixel can lie in as many patches as taps.
    plain = set(module.dilation) == {1} and (module.padding_mode != "circular" or set(module.stride) == {1})
    cover = windows(module.weight.shape[2:], module.stride) if plain else None
    return up(kernel_norm(module.weight, module.groups, cover), _padding_of_convolution(module))


def _padding_of_convolution(module: nn.Conv2d) -> float:
    pads = module._reversed_padding_repeated_twice
    if module.padding_mode != "circular":
        return padding_factor(pads, module.padding_mode)
    reach = [d * (k - 1) for d, k in zip(reversed(module.dilation), reversed(module.weight.shape[2:]), strict=True)]
    # Within the kernel's reach every tap still sees each pixel once, and the shifts stay permutations.
    if any(pads[2 * i] + pads[2 * i + 1] > most for i, most in enumerate(reach)):
        raise UncertifiableError("its circular padding is wider than the kernel reaches: lower padding")
    return 1.0


@register_lipschitz(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def batch_norm(module: nn.BatchNorm2d) -> float:
    """Return max |γ| / √(var + ε) of the running statistics."""
    scale = batch_norm_scale(module.running_var, module.weight, module.eps, module.training)
    return scale.abs().max().item() * (1 + 1e-14)


@register_lipschitz(BatchCentering)
def centring(module: BatchCentering) -> float:
    """Return 1 in evaluation mode, in which it subtracts a constant."""
    if module.training:
        raise UncertifiableError("it subtracts the mean of the batch in training mode: call eval() first")
    if module.running_mean.shape != (module.channels,):
        raise UncertifiableError(f"its means are {tuple(module.running_mean.shape)}: one a channel is needed")
    return 1.0


@register_lipschitz(nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d)
def circular_padding(module: Any) -> float:
    """Return √Π(1 + sides that are padded): a pixel can appear once more for every padded side of an axis."""
    return padding_factor(module.padding, "circular")
