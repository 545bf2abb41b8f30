"""The ℓ2 Lipschitz constants of layers, each sound for every input size.

| layer | constant |
|---|---|
| CayleyLinear, CayleyConv | 1 |
| Linear | spectral norm, from float64 |
| Conv1d/2d/3d | ``kernel_norm``, times the constant of the padding |
| BatchNorm (evaluation) | max |γ| / √(var + ε) |
| AvgPool, MaxPool | √(c·K)/divisor and √c |
| reflect, replicate, circular padding | √(how often one pixel can appear in the padded image) |
| ReLU, Tanh, … ; LeakyReLU, GELU, … | 1; the largest slope |
| Flatten, Identity, PixelShuffle, …; Dropout (evaluation) | 1 |

c is the number of windows that can cover one input, Π ⌈k/s⌉, and K the number of inputs in a window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from espalier.certify.bound import UncertifiableError, register_lipschitz
from espalier.nn.lipschitz.constant import kernel_norm, spectral_norm
from espalier.nn.orthogonal.conv import CayleyConv1d, CayleyConv2d, CayleyConv3d, CayleyConvTranspose2d
from espalier.nn.orthogonal.linear import CayleyLinear


@register_lipschitz(
    nn.Identity, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle,
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d,
    nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Tanh, nn.Softsign, nn.LogSigmoid, nn.Softshrink, nn.Tanhshrink,
    nn.Sigmoid,
)  # fmt: skip
def nonexpansive(module: nn.Module) -> float:
    """Return 1: isometries, and functions of one variable whose slope lies in [−1, 1]."""
    return 1.0


@register_lipschitz(CayleyLinear, CayleyConv1d, CayleyConv2d, CayleyConv3d, CayleyConvTranspose2d)
def orthogonal(module: nn.Module) -> float:
    """Return 1: (semi-)orthogonal for every value of the parameters; zero padding then cropping only contracts."""
    return 1.0


@register_lipschitz(nn.LeakyReLU)
def leaky_relu(module: nn.LeakyReLU) -> float:
    """Return max(1, |slope|)."""
    return max(1.0, abs(module.negative_slope))


@register_lipschitz(nn.PReLU)
def prelu(module: nn.PReLU) -> float:
    """Return max(1, max |slope|)."""
    return torch.cat((torch.ones(1), module.weight.detach().abs().cpu().flatten())).double().max().item()


@register_lipschitz(nn.ELU)
def elu(module: nn.ELU) -> float:
    """Return max(1, |α|)."""
    return max(1.0, abs(module.alpha))


_LARGEST_SLOPE: dict[type[nn.Module], float] = {nn.GELU: 1.13, nn.SiLU: 1.1, nn.Mish: 1.09, nn.SELU: 1.7581}


@register_lipschitz(*_LARGEST_SLOPE)
def smooth_activation(module: nn.Module) -> float:
    """Return the largest slope, rounded up in the last digit that is given."""
    return next(slope for cls, slope in _LARGEST_SLOPE.items() if isinstance(module, cls))


@register_lipschitz(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
def dropout(module: nn.Module) -> float:
    """Return 1 in evaluation mode, in which dropout does nothing."""
    if module.training:
        raise UncertifiableError("dropout draws at random in training mode: call eval() first")
    return 1.0


@register_lipschitz(nn.Linear)
def linear(module: nn.Linear) -> float:
    """Return the spectral norm of the weights."""
    return spectral_norm(module.weight)


@register_lipschitz(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def batch_norm(module: nn.BatchNorm2d) -> float:
    """Return max |γ| / √(var + ε) of the running statistics."""
    if module.training or module.running_var is None:
        raise UncertifiableError("batch norm mixes the images of a batch in training mode: call eval() first")
    scale = (module.running_var.detach().double() + module.eps).rsqrt()
    if module.weight is not None:
        scale = scale * module.weight.detach().double().abs()
    return scale.max().item() * (1 + 1e-14)


@register_lipschitz(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def convolution(module: nn.Conv2d) -> float:
    """Return a bound for every image size; see ``kernel_norm``.

    Raises:
        UncertifiableError: circular padding wider than the kernel reaches.
    """
    # Around the border of a torus whose side the stride does not divide, a pixel can lie in as many patches as taps.
    plain = set(module.dilation) == {1} and (module.padding_mode != "circular" or set(module.stride) == {1})
    cover = _cover(module.kernel_size, module.stride) if plain else None
    return kernel_norm(module.weight, module.groups, cover) * _padding_of_convolution(module)


@register_lipschitz(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
def average_pooling(module: Any) -> float:
    """Return √(c·K)/divisor, which is 1/√K without overlap.

    Raises:
        UncertifiableError: windows at the border that are averaged over fewer pixels.
    """
    axes = int(type(module).__name__[-2])
    kernel, stride, padding = (_tuple(value, axes) for value in (module.kernel_size, module.stride, module.padding))
    if module.ceil_mode or (any(padding) and not module.count_include_pad):
        raise UncertifiableError("windows at the border are averaged over fewer pixels: use ScaledAvgPool2d")
    size = math.prod(kernel)
    divisor = getattr(module, "divisor_override", None) or size
    return math.sqrt(_cover(kernel, stride) * size) / abs(divisor)


@register_lipschitz(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
def max_pooling(module: Any) -> float:
    """Return √c, which is 1 without overlap: a pixel can be the largest of c windows."""
    if module.return_indices:
        raise UncertifiableError("it returns indices: set return_indices=False")
    axes = int(type(module).__name__[-2])
    kernel, stride, dilation = (_tuple(value, axes) for value in (module.kernel_size, module.stride, module.dilation))
    return math.sqrt(_cover(kernel, stride) if set(dilation) == {1} else math.prod(kernel))


@register_lipschitz(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
def global_average(module: Any) -> float:
    """Return 1 for an average over the whole map (1/√pixels, were the size known).

    Raises:
        UncertifiableError: an output of more than one pixel, whose windows depend on the size of the image.
    """
    size = module.output_size
    if set(size if isinstance(size, tuple) else (size,)) != {1}:
        raise UncertifiableError("its windows depend on the image size: use ScaledAvgPool2d")
    return 1.0


@register_lipschitz(
    nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d, nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d
)
def mirror_padding(module: Any) -> float:
    """Return √Π(1 + sides that are padded): a pixel can appear once more for every padded side of an axis."""
    return _repeated(module.padding, longest=1)


@register_lipschitz(nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d)
def replicate_padding(module: Any) -> float:
    """Return √Π(1 + left + right): a border pixel appears once for every pixel of padding."""
    return _repeated(module.padding, longest=None)


def _padding_of_convolution(module: nn.Conv2d) -> float:
    if module.padding_mode == "zeros":
        return 1.0
    pads = module._reversed_padding_repeated_twice
    if module.padding_mode == "circular":
        reach = [d * (k - 1) for d, k in zip(reversed(module.dilation), reversed(module.kernel_size), strict=True)]
        # Within the kernel's reach every tap still sees each pixel once, and the shifts stay permutations.
        if any(pads[2 * i] + pads[2 * i + 1] > most for i, most in enumerate(reach)):
            raise UncertifiableError("its circular padding is wider than the kernel reaches: lower padding")
        return 1.0
    return _repeated(pads, longest=1 if module.padding_mode == "reflect" else None)


def _repeated(pads: Sequence[int], longest: int | None) -> float:
    sides = [max(0, pad) if longest is None else min(longest, max(0, pad)) for pad in pads]
    return math.sqrt(math.prod(1 + sides[i] + sides[i + 1] for i in range(0, len(sides), 2)))


def _cover(kernel: Sequence[int], stride: Sequence[int]) -> int:
    return math.prod(-(-k // s) for k, s in zip(kernel, stride, strict=True))


def _tuple(value: Any, axes: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, tuple) and len(value) == axes else (*_first(value),) * axes


def _first(value: Any) -> tuple[int]:
    return (value[0] if isinstance(value, tuple) else value,)
