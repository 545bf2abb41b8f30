"""Invertible downsampling: blocks of pixels become channels and back, an isometry in any number of dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from espalier.errors import EspalierError
from espalier.nn.kernels.arguments import BLOCKS
from espalier.nn.kernels.backend import choose
from espalier.nn.kernels.library import call, usable
from espalier.nn.precision import is_tracing, takes_batches


def space_to_depth(x: Tensor, stride: Sequence[int]) -> Tensor:
    """Move every block of ``stride`` pixels into channels, in the order of ``F.pixel_unshuffle``.

    Args:
        x: (B, C, *S).
        stride: block size along each of the spatial axes S.

    Returns:
        (B, C·∏stride, *S/stride): channel c becomes the channels c·∏stride … (c + 1)·∏stride − 1. The storage is
        ordered (*S/stride, B, C·∏stride) unless x is a contiguous image with one stride.

    Raises:
        EspalierError: a size that its stride does not divide.
    """
    if all(s == 1 for s in stride):
        return x
    batch, channels, *size = x.shape
    check_divides(size, stride)
    if len(set(stride)) == 1 and len(stride) == 2 and x.is_contiguous() and batch:  # torch's forgets to fold nothing
        if not is_tracing() and usable(x) and choose("orthogonal", "cpu") == "compiled":
            blocks: Tensor = _Shuffle.apply(x, stride[0], False)
            return blocks
        return F.pixel_unshuffle(x, stride[0])
    axes, cut = range(len(size)), _cut(size, stride)
    moved = x.reshape(batch, channels, *cut).permute(*(2 + 2 * a for a in axes), 0, 1, *(3 + 2 * a for a in axes))
    return channels_first(moved.reshape(*cut[::2], batch, channels * math.prod(stride)))


class _Shuffle(torch.autograd.Function):
    """``F.pixel_unshuffle``, or ``F.pixel_shuffle``, of contiguous images by the compiled kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stride: int, back: bool) -> Tensor:
        """See above; each is the other's adjoint."""
        ctx.stride, ctx.back = stride, back
        x = x.contiguous()
        batch, channels, height, width = x.shape
        if back:
            y = x.new_empty(batch, channels // stride**2, height * stride, width * stride)
        else:
            y = x.new_empty(batch, channels * stride**2, height // stride, width // stride)
        fine, coarse = (y, x) if back else (x, y)
        sizes = {"images": fine.shape[0] * fine.shape[1], "height": coarse.shape[2], "width": coarse.shape[3]}
        call(BLOCKS, x.dtype, source=x, target=y, **sizes, stride=stride, back=back)
        return y

    @staticmethod
    @takes_batches
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the images."""
        if is_tracing() or not usable(grad):
            return (F.pixel_unshuffle if ctx.back else F.pixel_shuffle)(grad, ctx.stride), None, None
        return _Shuffle.apply(grad, ctx.stride, not ctx.back), None, None


def blocks_last(x: Tensor, stride: Sequence[int]) -> Tensor:
    """Return every block of ``stride`` pixels as one row: (B, C, *S) → (*S/stride, B, ∏stride·C), channels innermost.

    Raises:
        EspalierError: a size that its stride does not divide.
    """
    rows = channels_last(x)
    if all(s == 1 for s in stride):
        return rows
    *size, batch, channels = rows.shape
    cut = _cut(size, stride)
    coarse, fine = range(0, len(cut), 2), range(1, len(cut), 2)
    moved = rows.reshape(*cut, batch, channels).permute(*coarse, len(cut), *fine, len(cut) + 1)
    return moved.flatten(len(size) + 1)


def check_divides(size: Sequence[int], stride: Sequence[int]) -> None:
    """Raise ``EspalierError`` unless each stride divides the image's size along its axis."""
    if any(n % s for n, s in zip(size, stride, strict=True)):
        raise EspalierError(f"image size {tuple(size)} is no multiple of the stride {tuple(stride)}: pad or crop it")


def _cut(size: Sequence[int], stride: Sequence[int]) -> list[int]:
    """Return the axes of an image cut into blocks: along each axis the number of blocks, then their side."""
    check_divides(size, stride)
    return [part for n, s in zip(size, stride, strict=True) for part in (n // s, s)]


def depth_to_space(x: Tensor, stride: Sequence[int]) -> Tensor:
    """Undo ``space_to_depth``: (B, C·∏stride, *S) → (B, C, *S·stride)."""
    if all(s == 1 for s in stride):
        return x
    batch, channels, *size = x.shape
    axes = range(len(size))
    blocks = channels_last(x).reshape(*size, batch, channels // math.prod(stride), *stride)
    inner = len(size) + 2
    moved = blocks.permute(*(axis for a in axes for axis in (a, inner + a)), len(size), len(size) + 1)
    fine = [n * s for n, s in zip(size, stride, strict=True)]
    return channels_first(moved.reshape(*fine, batch, channels // math.prod(stride)))


def channels_last(x: Tensor) -> Tensor:
    """View (B, C, *S) as (*S, B, C)."""
    return x.permute(*range(2, x.ndim), 0, 1)


def channels_first(x: Tensor) -> Tensor:
    """View (*S, B, C) as (B, C, *S)."""
    return x.permute(x.ndim - 2, x.ndim - 1, *range(x.ndim - 2))
