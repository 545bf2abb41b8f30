"""Orthogonal convolutions of images (*S, B, C) on their own torus: by the factored system, or a cached spectrum."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from espalier.nn.cayley import cayley_planes
from espalier.nn.precision import recording
from espalier.nn.spectral.dft import tables, tap_angles, to_images, to_spectrum
from espalier.nn.spectral.orthogonal import apply_cayley
from espalier.nn.spectral.planes import product


class Taps(NamedTuple):
    """A kernel as one matrix per tap and group, tall, and where its taps lie."""

    matrices: Tensor
    """(T, G, rows, columns), rows ≥ columns: transposed if the operator is wide."""
    offsets: tuple[tuple[int, ...], ...]
    """Per axis, the position of each tap relative to the output pixel."""
    wide: bool
    """Whether the operator has fewer outputs than inputs."""

    @classmethod
    def of(cls, weight: Tensor, groups: int, dilation: Sequence[int], *, adjoint: bool = False) -> Taps:
        """Return the taps of a weight (outputs, inputs/G, *K), or those of the adjoint operator.

        The tap (k − 1)//2 of every axis lies on the output pixel, as in torch's ``padding="same"``.
        """
        outputs, inputs, *kernel = weight.shape
        matrices = weight.reshape(groups, outputs // groups, inputs, -1).permute(3, 0, 1, 2)
        sign = -1 if adjoint else 1
        offsets = tuple(
            tuple(sign * d * (tap - (k - 1) // 2) for tap in range(k)) for k, d in zip(kernel, dilation, strict=True)
        )
        wide = (outputs // groups < inputs) != adjoint and outputs // groups != inputs
        # The adjoint of a wide operator is tall, and both are built from the same transposed matrices.
        return cls(matrices.mT if wide != adjoint else matrices, offsets, wide)


def convolve(x: Tensor, taps: Taps, bias: Tensor | None) -> Tensor:
    """Apply the orthogonal operator of a kernel, differentiable in both: what training uses.

    Args:
        x: images (*S, B, C).
        taps: the kernel, scaled.
        bias: one number per output channel.

    Returns:
        (*S, B, outputs).
    """
    angles = tap_angles(x.shape[:-2], taps.offsets, x.dtype, x.device)
    groups = taps.matrices.shape[1]
    return _between_transforms(x, groups, bias, lambda rows: apply_cayley(rows, taps.matrices, angles, wide=taps.wide))


def spectrum(taps: Taps, size: Sequence[int]) -> Tensor:
    """Return the planes of Qᵀ at every frequency of a torus, (2, F·G, inputs, outputs), differentiable.

    Args:
        taps: the kernel, scaled.
        size: of the torus.
    """
    matrices = taps.matrices
    angles = tap_angles(size, taps.offsets, matrices.dtype, matrices.device)
    flat = matrices.reshape(matrices.shape[0], -1)
    planes = ((table @ flat).view(-1, *matrices.shape[2:]) for table in angles)
    q = torch.stack(cayley_planes(*planes))
    return q if taps.wide else q.mT.contiguous()


def apply_spectrum(x: Tensor, planes: Tensor, groups: int, bias: Tensor | None) -> Tensor:
    """Apply an operator whose spectrum is known: what evaluation uses.

    Args:
        x: images (*S, B, C).
        planes: what ``spectrum`` returned for the size of these images.
        groups: G.
        bias: one number per output channel.
    """
    return _between_transforms(x, groups, bias, lambda rows: _multiply(rows, planes))


def _multiply(x: Tensor, planes: Tensor) -> Tensor:
    if recording() or (torch.is_grad_enabled() and (x.requires_grad or planes.requires_grad)):
        re, im = product((x[0], x[1]), (planes[0], planes[1]))
        assert im is not None
        return torch.stack((re, im))
    y = x.new_empty(*x.shape[:-1], planes.shape[-1])
    (x_r, x_i), (q_r, q_i) = x, planes
    torch.bmm(x_r, q_r, out=y[0]).baddbmm_(x_i, q_i, alpha=-1)
    torch.bmm(x_r, q_i, out=y[1]).baddbmm_(x_i, q_r)
    return y


def _between_transforms(x: Tensor, groups: int, bias: Tensor | None, operator: Callable[[Tensor], Tensor]) -> Tensor:
    """Transform, apply ``operator`` to rows (2, F·G, B, inputs), transform back."""
    *size, batch, channels = x.shape
    spectra = to_spectrum(x.reshape(*size, -1), tables(size, x.dtype, x.device, inverse=False))
    half = spectra.shape[1:-1]
    rows = spectra.view(2, math.prod(half), batch, groups, channels // groups).transpose(2, 3)
    y = operator(rows.reshape(2, -1, batch, channels // groups))
    y = y.view(2, -1, groups, batch, y.shape[-1]).transpose(2, 3).reshape(2, *half, -1)
    images = to_images(y, tables(size, x.dtype, x.device, inverse=True), bias)
    return images.view(*size, batch, -1)
