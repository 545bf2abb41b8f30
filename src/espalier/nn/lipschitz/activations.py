"""Activations that preserve gradients: they sort, reflect or fold channels, with Lipschitz constant 1."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from espalier.errors import EspalierError
from espalier.nn.lipschitz.inputs import check_width
from espalier.nn.precision import is_tracing, takes_batches, upcast
from espalier.sizes import whole_number


class MaxMin(nn.Module):
    """Sort channel j and channel j + C/2: (max(a, b), min(a, b)), a gradient-preserving activation.

    Its Jacobian is a permutation wherever it exists, so its Lipschitz constant is 1 and no gradient is lost. A gradient
    that is not finite, or of two numbers whose difference overflows, makes both of its pair NaN.

    Shapes: (B, C, …) → (B, C, …), C even.

    Raises:
        EspalierError: an odd number of channels.

    Source: Anil, Lucas & Grosse, arXiv 1811.05381, section 4.2 (GroupSort with groups of two).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the larger halves, then the smaller ones."""
        _check_groups(x, 2)
        if is_tracing():
            a, b = x.chunk(2, dim=1)
            swapped = a < b  # equal numbers stay in place, as below: the gradient follows each to where it came from
            return torch.cat((torch.where(swapped, b, a), torch.where(swapped, a, b)), dim=1)
        sorted_x: Tensor = _SortPairs.apply(x)
        return sorted_x

    def lipschitz_constant(self) -> float:
        """Return 1."""
        return 1.0


class _SortPairs(torch.autograd.Function):
    """MaxMin in the memory layout of its input, with an exchange as the backward pass: equal numbers stay in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Return (max(a, b), min(a, b)) for the halves a and b of x."""
        a, b = x.chunk(2, dim=1)
        swapped = torch.lt(a, b, out=torch.empty_like(a))
        ctx.save_for_backward(swapped)
        y = torch.empty_like(x)
        high, low = y.chunk(2, dim=1)
        torch.maximum(a, b, out=high)
        torch.minimum(a, b, out=low)
        return y

    @staticmethod
    @takes_batches
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Return the gradient of x: sent back to where each number came from."""
        return _exchange(grad, *ctx.saved_tensors)


class _Exchange(torch.autograd.Function):
    """Exchange the halves of x where ``swapped`` is 1: its own inverse, and its own transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, swapped: Tensor) -> Tensor:
        """Return x with its halves exchanged where asked."""
        ctx.save_for_backward(swapped)
        a, b = x.chunk(2, dim=1)
        y = torch.empty_like(x)
        first, second = y.chunk(2, dim=1)
        # Exact at weights 0 and 1, and many times faster on a CPU than a choice by a mask.
        torch.lerp(a, b, swapped, out=first)
        torch.lerp(b, a, swapped, out=second)
        return y

    @staticmethod
    @takes_batches
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Return the exchanged gradient."""
        return _exchange(grad, *ctx.saved_tensors), None


def _exchange(x: Tensor, swapped: Tensor) -> Tensor:
    if is_tracing():
        a, b = x.chunk(2, dim=1)
        exchanged = swapped != 0
        return torch.cat((torch.where(exchanged, b, a), torch.where(exchanged, a, b)), dim=1)
    result: Tensor = _Exchange.apply(x, swapped)
    return result


class GroupSort(nn.Module):
    """Sort groups of ``group_size`` channels, largest first; group j holds channels j, j + C/g, j + 2C/g, …

    Args:
        group_size: g, at least 2; ``GroupSort(2)`` equals ``MaxMin``.

    Shapes: (B, C, …) → (B, C, …), C divisible by g.

    Raises:
        EspalierError: a group that is no whole number from 2, or channels that do not divide into groups.

    Source: Anil, Lucas & Grosse, arXiv 1811.05381, section 4.2.
    """

    def __init__(self, group_size: int = 2) -> None:
        super().__init__()
        self.group_size = whole_number("group_size", group_size, least=2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sorted channels."""
        _check_groups(x, self.group_size)
        # Sizes by name: the tracing ONNX exporter fixes the batch in ``unflatten`` and ``flatten``.
        groups = x.reshape(x.shape[0], self.group_size, x.shape[1] // self.group_size, *x.shape[2:])
        return groups.sort(dim=1, descending=True).values.reshape(x.shape)

    def lipschitz_constant(self) -> float:
        """Return 1."""
        return 1.0

    def extra_repr(self) -> str:
        """Show the group size in ``print(model)``."""
        return f"group_size={self.group_size}"


class Abs(nn.Module):
    """Return |x|: slope ±1 everywhere, so that no gradient is lost.

    Shapes: any.

    Source: Anil, Lucas & Grosse, arXiv 1811.05381 (gradient-preserving activations).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the absolute values."""
        return x.abs()

    def lipschitz_constant(self) -> float:
        """Return 1."""
        return 1.0


class Householder(nn.Module):
    """Reflect the pairs of channels (a, b) that lie on one side of a learned line: z − 2·max(0, n·z)·n.

    Channel j is paired with channel j + C/2, and n = (sin θ/2, −cos θ/2). At θ = π/2, where it starts, it is a sort,
    the smaller number first. The map is continuous and an isometry on either side, so its constant is 1.

    Args:
        channels: C, even.

    Shapes: (B, C, …) → (B, C, …).

    Raises:
        EspalierError: channels that are no even number; on the input, another number than C, or integers or complex
            numbers.

    Source: Singla, Singla & Feizi, arXiv 2108.04062 (Householder activations).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = whole_number("channels", channels)
        if self.channels % 2:
            raise EspalierError(f"{channels} channels do not divide into pairs: choose an even width")
        self.theta = nn.Parameter(torch.empty(self.channels // 2))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set every angle to π/2; nothing is drawn."""
        self.theta.fill_(math.pi / 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the pairs, reflected where n·z > 0, computed in float32 or better, in the dtype of x."""
        check_width(x, 1, self.channels, f"(B, {self.channels}, …)")
        wide, theta = upcast(x, self.theta)
        a, b = wide.chunk(2, dim=1)
        half = 0.5 * theta.view(-1, *[1] * (x.ndim - 2))
        sine, cosine = half.sin(), half.cos()
        twice = 2 * torch.relu(sine * a - cosine * b)
        return torch.cat((a - twice * sine, b + twice * cosine), dim=1).to(x.dtype)

    def lipschitz_constant(self) -> float:
        """Return 1."""
        return 1.0

    def extra_repr(self) -> str:
        """Show the channels in ``print(model)``."""
        return f"{self.channels}"


def _check_groups(x: Tensor, size: int) -> None:
    if x.ndim < 2:
        raise EspalierError(f"input is {tuple(x.shape)}: give (B, C, …)")
    if x.shape[1] % size:
        raise EspalierError(f"{x.shape[1]} channels do not divide into groups of {size}: choose another width")
