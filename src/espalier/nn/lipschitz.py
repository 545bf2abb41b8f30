"""Parts of networks whose Lipschitz constant is known: each states it, and a certificate multiplies what it is told.

A module states its ℓ2 constant in one of two ways. A leaf has ``lipschitz_constant() -> float``; a module that contains
others has ``lipschitz_constant_from(bound) -> float``, where ``bound(child)`` is the constant of a child. A constant is
that of the exact map of the stored parameters: rounding of the forward pass is the certificate's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espalier.errors import EspalierError
from espalier.nn.precision import recording

# Relative error that a float64 computation of n terms is charged with: generous, and far below any margin.
_EPS = torch.finfo(torch.float64).eps


@runtime_checkable
class Lipschitz(Protocol):
    """A module that states its ℓ2 Lipschitz constant."""

    def lipschitz_constant(self) -> float:
        """Return an upper bound on ‖f(x) − f(y)‖₂ / ‖x − y‖₂ over all x ≠ y."""
        ...


@runtime_checkable
class LipschitzComposite(Protocol):
    """A module that states its ℓ2 Lipschitz constant from those of the modules it contains."""

    def lipschitz_constant_from(self, bound: Callable[[nn.Module], float]) -> float:
        """Return the constant, given a function that bounds a contained module."""
        ...


class MaxMin(nn.Module):
    """Sort channel j and channel j + C/2: (max(a, b), min(a, b)), a gradient-preserving activation.

    Its Jacobian is a permutation wherever it exists, so its Lipschitz constant is 1 and no gradient is lost.

    Shapes: (B, C, …) → (B, C, …), C even.

    Raises:
        EspalierError: an odd number of channels.

    Source: Anil, Lucas & Grosse, arXiv 1811.05381, section 4.2 (GroupSort with groups of two).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the larger halves, then the smaller ones."""
        a, b = _groups(x, 2).unbind(1)
        if recording():
            return torch.cat((torch.maximum(a, b), torch.minimum(a, b)), dim=1)
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
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Return the gradient of x: sent back to where each number came from."""
        sent_back: Tensor = _Exchange.apply(grad, *ctx.saved_tensors)
        return sent_back


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
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Return the exchanged gradient."""
        return _Exchange.apply(grad, *ctx.saved_tensors), None


class GroupSort(nn.Module):
    """Sort groups of ``group_size`` channels, largest first; group j holds channels j, j + C/g, j + 2C/g, …

    Args:
        group_size: g, at least 2; ``GroupSort(2)`` equals ``MaxMin``.

    Shapes: (B, C, …) → (B, C, …), C divisible by g.

    Raises:
        EspalierError: a group below 2, or channels that do not divide into groups.

    Source: Anil, Lucas & Grosse, arXiv 1811.05381, section 4.2.
    """

    def __init__(self, group_size: int = 2) -> None:
        super().__init__()
        if group_size < 2:
            raise EspalierError(f"group_size {group_size} sorts nothing: choose at least 2")
        self.group_size = group_size

    def forward(self, x: Tensor) -> Tensor:
        """Return the sorted channels."""
        return _groups(x, self.group_size).sort(dim=1, descending=True).values.flatten(1, 2)

    def lipschitz_constant(self) -> float:
        """Return 1."""
        return 1.0

    def extra_repr(self) -> str:
        """Show the group size in ``print(model)``."""
        return f"group_size={self.group_size}"


class ConvexSum(nn.Module):
    """Residual connection as a convex combination: (1 − c)·x + c·f(x), with c = sigmoid(``logit``) learned.

    Its constant is (1 − c) + c·L(f), which is 1 where f is 1-Lipschitz; the plain x + f(x) would have 2.

    Args:
        fn: f, which keeps the shape of its input.
        coefficient: c at the start, strictly between 0 and 1.

    Raises:
        EspalierError: a coefficient outside (0, 1).

    Source: Trockman & Kolter, arXiv 2104.07167, section 5 (the residual nets).
    """

    def __init__(self, fn: nn.Module, coefficient: float = 0.5) -> None:
        super().__init__()
        if not 0 < coefficient < 1:
            raise EspalierError(f"coefficient {coefficient} of a convex sum: choose a number strictly between 0 and 1")
        self.fn, self.coefficient = fn, float(coefficient)
        self.logit = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set c back to its start; nothing is drawn."""
        self.logit.fill_(math.log(self.coefficient / (1 - self.coefficient)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the combination of x and f(x)."""
        return torch.lerp(x, self.fn(x), torch.sigmoid(self.logit).to(x.dtype))

    def lipschitz_constant_from(self, bound: Callable[[nn.Module], float]) -> float:
        """Return (1 − c) + c·L(f)."""
        c = torch.sigmoid(self.logit.detach().double()).item()
        return 1.0 + c * (bound(self.fn) - 1.0)


class InvertibleDownsampling(nn.Module):
    """Move every s×s block of pixels into channels: an isometry that halves (for s = 2) height and width.

    Args:
        factor: s, at least 1.

    Shapes: (B, C, H, W) → (B, C·s², H/s, W/s).

    Raises:
        EspalierError: a factor below 1, or sides that it does not divide.
    """

    def __init__(self, factor: int) -> None:
        super().__init__()
        if factor < 1:
            raise EspalierError(f"factor {factor} of a downsampling: choose at least 1")
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Return the rearranged pixels."""
        if x.shape[-2] % self.factor or x.shape[-1] % self.factor:
            raise EspalierError(f"image of {x.shape[-2]}×{x.shape[-1]}: sides must be divisible by {self.factor}")
        return F.pixel_unshuffle(x, self.factor)

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
        EspalierError: a kernel below 1.
    """

    def __init__(self, kernel_size: int | None = None) -> None:
        super().__init__()
        if kernel_size is not None and kernel_size < 1:
            raise EspalierError(f"kernel_size {kernel_size} of a pooling: choose at least 1, or None for the whole map")
        self.kernel_size = kernel_size

    def forward(self, x: Tensor) -> Tensor:
        """Return the scaled averages."""
        if self.kernel_size is None:
            return x.sum((-2, -1), keepdim=True) * (x.shape[-2] * x.shape[-1]) ** -0.5
        if self.kernel_size == 1:
            return x
        return F.avg_pool2d(x, self.kernel_size) * self.kernel_size

    def lipschitz_constant(self) -> float:
        """Return 1."""
        return 1.0

    def extra_repr(self) -> str:
        """Show the kernel in ``print(model)``."""
        return f"kernel_size={self.kernel_size}"


class NormalizedLinear(nn.Linear):
    """Linear layer whose rows are used at unit norm: W_i/‖W_i‖·x + b, for the last layer of a Lipschitz net.

    Every score is then 1-Lipschitz in the features, though the vector of scores is not: a certificate must use the
    pairwise distances ‖w_y − w_j‖ ≤ 2, which ``espalier.certify`` does.

    Shapes: (…, in_features) → (…, out_features).

    Source: Singla, Singla & Feizi, arXiv 2108.04062, section 4 (last-layer normalisation).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores."""
        return F.linear(x, self.classifier_weight(), self.bias)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw weights and bias uniformly from ±1/√in_features, torch's default."""
        bound = self.in_features**-0.5
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound, generator=generator)

    def classifier_weight(self) -> Tensor:
        """Return the matrix that is applied: the rows of ``weight`` at unit norm."""
        return F.normalize(self.weight, dim=1)

    def lipschitz_constant(self) -> float:
        """Return the spectral norm of the normalised matrix."""
        return spectral_norm(F.normalize(self.weight.detach().double(), dim=1))


def spectral_norms(matrices: Tensor) -> Tensor:
    """Return upper bounds on the largest singular value of every matrix, from float64, rounding added.

    Args:
        matrices: (…, m, n).

    Returns:
        (…) in float64; NaN for all of them if any value is not finite.
    """
    exact = matrices.detach().double()
    if not torch.isfinite(exact).all():
        return exact.new_full(exact.shape[:-2], float("nan"))
    return torch.linalg.matrix_norm(exact, 2) * (1.0 + 16 * max(exact.shape[-2:]) * _EPS)


def spectral_norm(matrix: Tensor) -> float:
    """Return an upper bound on the largest singular value of one matrix (m, n); see ``spectral_norms``."""
    return spectral_norms(matrix).item()


def kernel_norm(weight: Tensor, groups: int = 1, cover: int | None = None) -> float:
    """Return an upper bound on the norm of a convolution with this kernel, on zero-padded images and on any torus.

    The least of three, per group, with W_t the matrix of tap t and G = W⋆W the taps of its Gram kernel:

        Σ_t ‖W_t‖          every shift drops or permutes pixels
        √(Σ_t ‖G_t‖)       the same for x ↦ WᵀWx: close to 1 if the kernel is orthogonal on every torus
        √cover·‖[W_t]_t‖   a pixel lies in at most ``cover`` patches: exact if patches do not overlap

    Args:
        weight: (outputs, inputs/groups, *taps); any stride and dilation.
        groups: independent parts.
        cover: how many patches one pixel can lie in; all taps if None.
    """
    kernel = weight.detach().double().unflatten(0, (groups, -1))
    axes = tuple(range(3, kernel.ndim))
    taps_GTOI = kernel.flatten(3).movedim(3, 1)
    shifts_G = spectral_norms(taps_GTOI).sum(1)
    patches_G = spectral_norms(kernel.flatten(2)) * math.sqrt(taps_GTOI.shape[1] if cover is None else cover)
    # A full-size transform, so that the Gram kernel's 2k − 1 taps do not wrap around.
    spectrum = torch.fft.fftn(kernel, s=[2 * n - 1 for n in kernel.shape[3:]], dim=axes)
    if kernel.shape[1] < kernel.shape[2]:
        spectrum = spectrum.transpose(1, 2)
    gram = torch.fft.ifftn(torch.einsum("goi...,goj...->gij...", spectrum.conj(), spectrum), dim=axes).real
    grams_G = spectral_norms(gram.flatten(3).movedim(3, 1)).sum(1).sqrt()
    bounds_G = torch.minimum(torch.minimum(shifts_G, grams_G), patches_G)
    return bounds_G.max().item() * (1.0 + 1e-12)


def _groups(x: Tensor, size: int) -> Tensor:
    if x.shape[1] % size:
        raise EspalierError(f"{x.shape[1]} channels do not divide into groups of {size}: choose another width")
    return x.unflatten(1, (size, x.shape[1] // size))
