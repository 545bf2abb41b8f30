"""How a module states its ℓ2 Lipschitz constant, and the norms that constants are computed from.

A module states its ℓ2 constant in one of two ways. A leaf has ``lipschitz_constant() -> float``; a module that contains
others has ``lipschitz_constant_from(bound) -> float``, where ``bound(child)`` is the constant of a child. A constant is
that of the exact map of the stored parameters: rounding of the forward pass is the certificate's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from espalier.errors import EspalierError

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


def spectral_norms(matrices: Tensor) -> Tensor:
    """Return upper bounds on the largest singular value of every matrix, from float64, rounding added.

    Args:
        matrices: (…, m, n).

    Returns:
        (…) in float64; NaN for all of them if any value is not finite.

    Raises:
        EspalierError: complex matrices.
    """
    exact = _double(matrices)
    if not torch.isfinite(exact).all():
        return exact.new_full(exact.shape[:-2], float("nan"))
    return torch.linalg.matrix_norm(exact, 2) * (1.0 + 16 * max(exact.shape[-2:]) * _EPS)


def spectral_norm(matrix: Tensor) -> float:
    """Return an upper bound on the largest singular value of one matrix (m, n); see ``spectral_norms``.

    Raises:
        EspalierError: no matrix (``kernel_norm`` is for convolutions), or a complex one.
    """
    if matrix.ndim != 2:
        raise EspalierError(f"matrix is {tuple(matrix.shape)}: give one (m, n); kernel_norm bounds a convolution")
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

    Raises:
        EspalierError: a complex kernel, one without taps, groups that do not divide the outputs, or a cover below 1.
    """
    exact = _double(weight)
    if exact.ndim < 3 or groups < 1 or len(exact) % groups:
        raise EspalierError(f"weight {tuple(weight.shape)} has no {groups} groups of (outputs, inputs, *taps)")
    if cover is not None and cover < 1:  # the bound would be 0
        raise EspalierError(f"cover is {cover}: a pixel lies in 1 patch at least")
    # Divided by powers of two near its largest number, for the squares below neither to overflow nor to vanish. By two
    # of them: one alone can be out of range.
    exponent = math.frexp(exact.abs().max().item() if torch.isfinite(exact).all() and exact.numel() else 0.0)[1]
    scales = math.ldexp(1.0, exponent // 2), math.ldexp(1.0, exponent - exponent // 2)
    kernel = (exact / scales[0] / scales[1]).unflatten(0, (groups, -1))
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
    return bounds_G.max().item() * (1.0 + 1e-12) * scales[0] * scales[1]


def _double(weight: Tensor) -> Tensor:
    if weight.is_complex():  # float64 would drop the imaginary part, and the bound be too low
        raise EspalierError(f"a weight of {weight.dtype} has no norm here: bound real ones, (re, −im; im, re)")
    return weight.detach().double()
