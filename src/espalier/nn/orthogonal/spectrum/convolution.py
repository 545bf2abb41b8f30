"""Orthogonal convolutions of images (*S, B, C) on their own torus: by the factored system, or a cached spectrum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from espalier.nn.kernels import split_complex as kernels
from espalier.nn.kernels.library import fresh
from espalier.nn.orthogonal.spectrum.dft import tables, tap_angles, to_images, to_spectrum
from espalier.nn.orthogonal.spectrum.operator import apply_cayley
from espalier.nn.orthogonal.spectrum.split_complex import SplitComplex, each, product
from espalier.nn.precision import is_tracing, takes_batches, without_autocast

_Operator = Callable[[SplitComplex], SplitComplex]


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
        # As numbers: ``torch.jit.trace`` hands out sizes as tensors, and cannot compare their comparisons.
        outputs, inputs, *kernel = (int(n) for n in weight.shape)
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
    """Return Qᵀ at every frequency of a torus, split-complex (2, F·G, inputs, outputs), differentiable.

    Args:
        taps: the kernel, scaled.
        size: of the torus.
    """
    matrices = taps.matrices
    angles = tap_angles(size, taps.offsets, matrices.dtype, matrices.device)
    real, imag = apply_cayley((), matrices, angles, wide=False)
    kept = fresh(real, 2, *real.shape) if kernels.compiled(real, imag) else None
    q = torch.stack((real, imag), out=kept)
    return q.mT.contiguous() if taps.wide else q


def apply_spectrum(x: Tensor, planes: Tensor, groups: int, bias: Tensor | None) -> Tensor:
    """Apply an operator whose spectrum is known: what evaluation uses.

    Args:
        x: images (*S, B, C).
        planes: what ``spectrum`` returned for the size of these images.
        groups: G.
        bias: one number per output channel.
    """
    return _between_transforms(x, groups, bias, lambda rows: _multiply(rows, tuple(planes)))


class _Multiply(torch.autograd.Function):
    """``product`` of split-complex factors, differentiable any number of times; the same digits with and without it."""

    @staticmethod
    def forward(ctx: Any, *planes: Tensor) -> SplitComplex:
        """Return the real and imaginary parts of x·q."""
        ctx.save_for_backward(*planes)
        return product(planes[:2], planes[2:])

    @staticmethod
    @takes_batches
    @without_autocast
    def backward(ctx: Any, real: Tensor, imag: Tensor) -> tuple[Tensor | None, ...]:
        """Return ∂x = ∂y·qᴴ and ∂q = xᴴ·∂y."""
        x_r, x_i, q_r, q_i = ctx.saved_tensors
        of_x, of_q = any(ctx.needs_input_grad[:2]), any(ctx.needs_input_grad[2:])
        grad_x = _multiply((real, imag), (q_r.mT, -q_i.mT)) if of_x else (None, None)
        grad_q = _multiply((x_r.mT, -x_i.mT), (real, imag)) if of_q else (None, None)
        return *grad_x, *grad_q


def _multiply(x: SplitComplex, q: SplitComplex) -> SplitComplex:
    if is_tracing():
        return product(x, q)
    result: SplitComplex = _Multiply.apply(*x, *q)
    return result


def _between_transforms(x: Tensor, groups: int, bias: Tensor | None, operator: _Operator) -> Tensor:
    """Transform, apply ``operator`` to rows, split-complex (F·G, B, inputs), transform back."""
    *size, batch, channels = x.shape
    forward_tables = tables(size, x.dtype, x.device, inverse=False, channels=channels)
    planes = to_spectrum(x.reshape(*size, batch * channels), forward_tables)
    frequencies = len(forward_tables.kept)

    # Every size is named: an empty batch leaves nothing to infer one from.
    def to_rows(plane: Tensor) -> Tensor:
        rows = plane.view(frequencies, batch, groups, channels // groups).transpose(1, 2)
        return rows.reshape(frequencies * groups, batch, channels // groups)

    def from_rows(plane: Tensor) -> Tensor:
        apart = plane.view(frequencies, groups, batch, plane.shape[-1]).transpose(1, 2)
        return apart.reshape(frequencies, batch * groups * plane.shape[-1])

    y = operator(each(to_rows, planes))
    outputs = groups * y[0].shape[-1]
    inverse_tables = tables(size, x.dtype, x.device, inverse=True, channels=outputs)
    images = to_images(each(from_rows, y), inverse_tables, bias)
    return images.view(*size, batch, outputs)
