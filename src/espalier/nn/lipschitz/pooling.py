"""Smaller maps without a larger norm: blocks of pixels as channels, scaled averages, norms."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.errors import EspalierError
from espalier.nn.lipschitz.inputs import check_floating
from espalier.sizes import whole_number


class InvertibleDownsampling(nn.Module):
    """Move every s×s block of pixels into channels: an isometry that halves (for s = 2) height and width.

    Args:
        factor: s, at least 1.

    Shapes: (B, C, H, W) → (B, C·s², H/s, W/s).

    Raises:
        EspalierError: a factor that is no whole number from 1, or sides that it does not divide.
    """

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = whole_number("factor", factor)

    def forward(self, x: Tensor) -> Tensor:
        """Return the rearranged pixels."""
        _check_images(x)
        if x.shape[-2] % self.factor or x.shape[-1] % self.factor:
            raise EspalierError(f"image of {x.shape[-2]}×{x.shape[-1]}: sides must be divisible by {self.factor}")
        y = F.pixel_unshuffle(x, self.factor)
        if y.shape[-1] * self.factor == x.shape[-1]:
            return y
        # Torch leaves an empty batch as it is.
        *lead, channels, height, width = x.shape
        return x.reshape(*lead, channels * self.factor**2, height // self.factor, width // self.factor)

    def lipschitz_constant(self) -> float:
        """Return 1."""
        return 1.0

    def extra_repr(self) -> str:
        """Show the factor in ``print(model)``."""
        return f"factor={self.factor}"


class ScaledAvgPool2d(nn.Module):
    """Average over k×k blocks, times k: the sum over a block divided by the root of its size, exactly 1-Lipschitz.

    Plain average pooling has constant 1/k: a net that uses it throws away a factor k of every margin.

    Args:
        kernel_size: k; None pools the whole map, whatever its size, to 1×1.

    Shapes: (B, C, H, W) → (B, C, ⌊H/k⌋, ⌊W/k⌋); pixels beyond the last whole block are dropped.

    Raises:
        EspalierError: a kernel that is no whole number from 1; on the input, sides shorter than the kernel, or integers
            or complex numbers.
    """

    def __init__(self, kernel_size: int | None = None) -> None:
        super().__init__()
        self.kernel_size = None if kernel_size is None else whole_number("kernel_size", kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scaled averages."""
        check_floating(x)
        _check_images(x)
        side = self.kernel_size or 1
        if x.ndim > 4 or x.shape[-2] < side or x.shape[-1] < side:
            raise EspalierError(f"input is {tuple(x.shape)}: give (B, C, H, W), no side below kernel_size {side}")
        if self.kernel_size is None:
            scale = (x.shape[-2] * x.shape[-1]) ** -0.5
            if x.dtype in (torch.float16, torch.bfloat16):  # the sum, a side times the result, may be out of range
                return (x.sum((-2, -1), keepdim=True, dtype=torch.float32) * scale).to(x.dtype)
            return x.sum((-2, -1), keepdim=True) * scale
        if self.kernel_size == 1:
            return x
        return F.avg_pool2d(x, self.kernel_size) * self.kernel_size

    def lipschitz_constant(self) -> float:
        """Return 1."""
        return 1.0

    def extra_repr(self) -> str:
        """Show the kernel in ``print(model)``."""
        return f"kernel_size={self.kernel_size}"


class L2Pool2d(InvertibleDownsampling):
    """Take the ℓ2 norm of every s×s block of pixels, channel by channel: 1-Lipschitz, and no number is dropped.

    Its gradient at a block of zeros is 0.

    Args:
        factor: s, at least 1.

    Shapes: (B, C, H, W) → (B, C, H/s, W/s).

    Raises:
        EspalierError: a factor that is no whole number from 1; on the input, sides that it does not divide, or integers
            or complex numbers.

    Source: Sermanet, Chintala & LeCun, arXiv 1204.3968 (Lp pooling).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the norms."""
        if x.ndim != 4:
            raise EspalierError(f"input is {tuple(x.shape)}: give (B, C, H, W)")
        check_floating(x)
        blocks = super().forward(x)
        parts = blocks.reshape(blocks.shape[0], x.shape[1], self.factor**2, *blocks.shape[2:])
        return torch.linalg.vector_norm(parts, dim=2)

    def lipschitz_constant(self) -> float:
        """Return 1."""
        return 1.0


def _check_images(x: Tensor) -> None:
    if x.ndim < 3 or 0 in x.shape[-2:]:
        raise EspalierError(f"input is {tuple(x.shape)}: give (B, C, H, W), no side of 0")
