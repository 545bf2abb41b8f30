"""Depthwise convolutions, and the GELU and batch norm around them, by compiled kernels where those can run on a CPU."""

from __future__ import annotations

from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.nn.kernels.backend import choose
from espalier.nn.kernels.depthwise import Norm, Padding, depthwise, gelu_norm, mix, point
from espalier.nn.kernels.library import PRECISE, usable
from espalier.nn.plain import computes_as, is_watched, remember
from espalier.nn.precision import is_tracing
from espalier.sizes import per_axis, whole_number

_MIXED = (torch.float32, torch.bfloat16)
_LARGEST = 15  # side of a kernel that the compiled convolution is proved for


@remember
class DepthwiseConv2d(nn.Conv2d):
    """``nn.Conv2d(channels, channels, kernel_size, groups=channels)``, faster on a CPU.

    It has that layer's parameters, options, formula and gradients. The compiled kernel runs for stride and dilation 1,
    zero padding and sides up to 15, in float32, in float64, and in bfloat16 (also under autocast) with taps of
    bfloat16 and float32 sums; what it cannot take, ``nn.Conv2d`` computes. Its outputs are channels-last; frozen taps
    get no gradient computed.

    Args:
        channels: of the input and the output.
        kernel_size: side or sides of the kernel.
        stride: as in ``nn.Conv2d``.
        padding: as in ``nn.Conv2d``, ``"same"`` by default.
        dilation: as in ``nn.Conv2d``.
        bias: whether to add one number a channel.
        padding_mode: as in ``nn.Conv2d``.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        EspalierError: a size that is no whole number, or too small.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = "same",
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        channels = whole_number("channels", channels)
        given = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation}
        sizes: dict[str, Any] = {name: per_axis(name, value, 2) for name, value in given.items()}
        sizes["padding"] = padding if isinstance(padding, str) else per_axis("padding", padding, 2, least=0)
        options: dict[str, Any] = {"bias": bias, "padding_mode": padding_mode, "device": device, "dtype": dtype}
        super().__init__(channels, channels, **sizes, groups=channels, **options)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve (B, C, H, W), or (C, H, W)."""
        # One look each: a parametrised weight is made anew, and drawn, or moved on, at every look.
        weight, bias = self.weight, self.bias
        if not (_fits(self, input) and _compiled(input, weight, bias)):
            return self._conv_forward(input, weight, bias)
        x = _autocast(input)
        taps, bias = _summed(x, weight, bias)
        return depthwise(x, taps, bias, _padding(self))


def pointwise_block(x: Tensor, conv: nn.Module, act: nn.Module, norm: nn.Module) -> Tensor:
    """Return ``norm(act(conv(x)))``: fused for GELU after a convolution of torch's, called one by one else."""
    parts = _parts(x, conv, act, norm) if _is_convolution(conv) and conv.padding_mode == "zeros" else None
    if parts is None:
        return norm(act(conv(x)))
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    weight, bias, after = parts
    if _is_product(conv, x) and not _lacks_values(norm, x):
        narrow, matrix = _autocast(x), _autocast(weight)
        if narrow.dtype == matrix.dtype:
            return _track(norm, *point(narrow, matrix.flatten(1), bias, after))
    # The bias is added where GELU is computed.
    x = x.contiguous(memory_format=torch.channels_last)
    u = F.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
    return norm(act(conv(x))) if _lacks_values(norm, u) else _track(norm, *gelu_norm(u, bias, after))


def mixing_block(x: Tensor, conv: nn.Module, act: nn.Module, norm: nn.Module) -> Tensor:
    """Return ``x + norm(act(conv(x)))`` for a depthwise convolution that keeps the size, fused if it can be."""
    parts = _parts(x, conv, act, norm) if _fits(conv, x) and _keeps_size(conv) else None
    # What autocast narrows for the convolution is added whole: the kernel reads it once, in one precision.
    if parts is None or _lacks_values(norm, x) or _autocast(x).dtype != x.dtype:
        return x + norm(act(conv(x)))
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    weight, bias, after = parts
    (taps,) = _summed(x, weight)
    return _track(norm, *mix(x, taps, bias, after, _padding(conv)))


def _autocast(x: Tensor) -> Tensor:
    """Return x as autocast would hand it to a convolution."""
    return x.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64 else x


def _summed(x: Tensor, *parameters: Tensor | None) -> list[Any]:
    """Return parameters in the precision of sums over maps like x."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return [p if p is None or p.dtype is dtype else p.to(dtype) for p in parameters]


def _is_fixed(norm: nn.BatchNorm2d) -> bool:
    """Return whether the statistics are the running ones."""
    return not norm.training and norm.running_mean is not None


def _lacks_values(norm: nn.Module, u: Tensor) -> bool:
    """Return whether statistics would be taken of one value a channel, which torch refuses."""
    assert isinstance(norm, nn.BatchNorm2d)
    return not _is_fixed(norm) and u.numel() == u.shape[1]


def _track(norm: nn.BatchNorm2d, y: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Move the running statistics as ``nn.BatchNorm2d`` does: unbiased variance, momentum None averages; return y."""
    if not norm.training or not norm.track_running_stats or norm.running_mean is None or norm.running_var is None:
        return y
    count = y.numel() // y.shape[1]
    with torch.no_grad():
        momentum = norm.momentum or 0.0
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            momentum = 1 / float(norm.num_batches_tracked) if norm.momentum is None else momentum
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
        norm.running_var.lerp_((variance * (count / (count - 1))).to(norm.running_var.dtype), momentum)
    return y


def _padding(conv: nn.Conv2d) -> Padding:
    """Return the rows and columns of zeros; an odd one of "same" goes last, as in torch."""
    if conv.padding == "same":
        (rows, columns) = (k - 1 for k in conv.kernel_size)
        return rows // 2, rows - rows // 2, columns // 2, columns - columns // 2
    if conv.padding == "valid":
        return 0, 0, 0, 0
    rows, columns = (int(p) for p in conv.padding)
    return rows, rows, columns, columns


def _keeps_size(conv: nn.Module) -> bool:
    assert isinstance(conv, nn.Conv2d)
    top, bottom, left, right = _padding(conv)
    return (top + bottom, left + right) == tuple(k - 1 for k in conv.kernel_size)


def _is_product(conv: nn.Conv2d, x: Tensor) -> bool:
    """Return whether each pixel of x is multiplied by one matrix."""
    alone = conv.kernel_size == conv.stride == (1, 1) and conv.padding in ("same", "valid", (0, 0))
    return alone and conv.groups == 1 and x.shape[1] == conv.in_channels


def _fits(conv: nn.Module, x: Tensor) -> TypeGuard[nn.Conv2d]:
    """Return whether this is a convolution of the kind that is compiled, and x of the size that it takes."""
    if not (_is_convolution(conv) and conv.groups == conv.in_channels == conv.out_channels and isinstance(x, Tensor)):
        return False
    if conv.stride != (1, 1) or conv.dilation != (1, 1) or conv.padding_mode != "zeros":
        return False
    if x.ndim != 4 or x.shape[1] != conv.in_channels or not x.numel() or max(conv.kernel_size) > _LARGEST:
        return False
    top, bottom, left, right = _padding(conv)
    (rows, columns), (height, width) = conv.kernel_size, x.shape[2:]
    inside = max(top, bottom) < rows and max(left, right) < columns
    return inside and height + top + bottom >= rows and width + left + right >= columns


def _parts(x: Tensor, conv: nn.Conv2d, act: nn.Module, norm: nn.Module) -> tuple[Tensor, Any, Norm] | None:
    """Return the convolution's weight and bias, and batch norm, to compute all three from; None if they must be called.

    They may be fused if GELU and batch norm are torch's own, and nothing watches them.
    """
    if type(act) is not nn.GELU or act.approximate != "none" or type(norm) is not nn.BatchNorm2d:
        return None
    if not (computes_as(act, nn.GELU) and computes_as(norm, nn.BatchNorm2d)):
        return None
    if not isinstance(x, Tensor) or x.ndim != 4 or not x.numel():  # torch.fx traces with what is no tensor
        return None
    if is_watched(conv) or is_watched(act) or is_watched(norm):
        return None
    # Each is read once: looking up a module's tensor takes half a microsecond.
    tensors = scale, shift, mean, variance = norm.weight, norm.bias, norm.running_mean, norm.running_var
    weight, bias = conv.weight, conv.bias
    if scale is None or shift is None:
        return None
    if not _compiled(x, weight, bias, *tensors):
        return None
    if not _is_fixed(norm):
        mean = variance = None
    bias, scale, shift, mean, variance = _summed(x, bias, scale, shift, mean, variance)
    return weight, bias, Norm(scale, shift, norm.eps, mean, variance)


def _compiled(x: Tensor, *parameters: Tensor | None) -> bool:
    """Return whether kernels may read these, and run."""
    return not is_tracing() and usable(x, *parameters, dtypes=_kinds(x)) and choose("depthwise", "cpu") == "compiled"


def _kinds(x: Tensor) -> tuple[torch.dtype, ...]:
    """Return the dtypes that torch would take together with x: its own, or half-precision maps and float32."""
    if torch.is_autocast_enabled("cpu"):
        return _MIXED if torch.get_autocast_dtype("cpu") == torch.bfloat16 else ()
    return _MIXED if x.dtype == torch.bfloat16 else (x.dtype,) if x.dtype in PRECISE else ()


def _is_convolution(conv: nn.Module) -> TypeGuard[nn.Conv2d]:
    return computes_as(conv, nn.Conv2d) or computes_as(conv, DepthwiseConv2d)
