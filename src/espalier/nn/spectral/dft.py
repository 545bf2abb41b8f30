"""The real discrete Fourier transform of images as matrix products, in planes, over one to three axes.

Images come as (*S, N): the spatial axes first, N = batch × channels last. Spectra leave as (2, *S', N): the two planes
first, the last spatial axis cut to its first half plus one. Both directions are real-linear maps, so the backward pass
of each is the transpose, which is the other one with other weights.

Note [DFT as GEMM]: for the 8 to 64 points of these images, one product with a cosine and a sine matrix is faster than
an FFT and the permutations around it, and it reads a channels-first image without copying it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from espalier.nn.precision import recording, without_autocast
from espalier.nn.spectral.planes import product


class Tables(NamedTuple):
    """The matrices of one transform: the half-spectrum ones of the last axis, the complex ones of the others."""

    last: Tensor
    """(2, W//2 + 1, W): cosine and minus sine, weighted."""
    others: tuple[Tensor, ...]
    """(2n, 2n) for every axis but the last: the real form of e^(−iθ), weighted."""


def tables(size: Sequence[int], dtype: torch.dtype, device: torch.device, *, inverse: bool) -> Tables:
    """Return the matrices for images of ``size``, those of the inverse transform if asked.

    They are computed in float64 and rounded once, and kept for later calls, except while a graph is being traced.
    """
    build = _build_tables if recording() else _kept_tables
    return build(tuple(int(n) for n in size), dtype, device, inverse)


def _build_tables(size: tuple[int, ...], dtype: torch.dtype, device: torch.device, inverse: bool) -> Tables:
    *lead, width = size
    cos, sin = _angles(width // 2 + 1, width)
    last = torch.stack((cos, -sin))
    if inverse:
        # Frequencies that stand for themselves and their mirror image count twice.
        counts = [1.0 if 2 * w % width == 0 else 2.0 for w in range(width // 2 + 1)]
        last = last * (torch.tensor(counts, dtype=torch.float64)[:, None] / width)
    others = []
    for n in lead:
        cos, sin = _angles(n, n)
        real_form = torch.cat((torch.cat((cos, sin), 1), torch.cat((-sin, cos), 1)))
        others.append((real_form / n if inverse else real_form).to(device, dtype))
    return Tables(last.to(device, dtype), tuple(others))


_kept_tables = functools.lru_cache(maxsize=64)(_build_tables)


class Angles(NamedTuple):
    """Cosine and sine of the angle of every tap at every frequency, each (F, T)."""

    cos: Tensor
    sin: Tensor


def tap_angles(
    size: Sequence[int], offsets: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device
) -> Angles:
    """Return the angles of a correlation's taps: tap o turns by ``2π Σ_a f_a o_a / n_a`` at the frequency f.

    Args:
        size: of the images, (n_a). Frequencies are those of ``analyse``, in its order.
        offsets: per axis, where its taps lie relative to the output pixel.
        dtype: of the result, which is computed in float64 and kept for later calls.
        device: of the result.
    """
    build = _build_angles if recording() else _kept_angles
    return build(tuple(int(n) for n in size), tuple(tuple(o) for o in offsets), dtype, device)


def _build_angles(
    size: tuple[int, ...], offsets: tuple[tuple[int, ...], ...], dtype: torch.dtype, device: torch.device
) -> Angles:
    theta = torch.zeros(1, 1, dtype=torch.float64)
    for axis, (n, taps) in enumerate(zip(size, offsets, strict=True)):
        count = n // 2 + 1 if axis == len(size) - 1 else n
        turns = torch.outer(torch.arange(count), torch.tensor(taps)) % n
        here = turns.double() * (2 * math.pi / n)
        theta = (theta[:, None, :, None] + here[None, :, None, :]).reshape(theta.shape[0] * count, -1)
    return Angles(theta.cos().to(device, dtype), theta.sin().to(device, dtype))


_kept_angles = functools.lru_cache(maxsize=64)(_build_angles)


def _angles(rows: int, n: int) -> tuple[Tensor, Tensor]:
    turns = torch.outer(torch.arange(rows), torch.arange(n)) % n  # reduced as integers: exact at any size
    theta = turns.double() * (2 * math.pi / n)
    return theta.cos(), theta.sin()


def analyse(x: Tensor, matrices: Tables) -> Tensor:
    """Return the weighted transform (2, *S', N) of x (*S, N)."""
    *lead, width, columns = x.shape
    half = matrices.last.shape[1]
    rows = _columns_last(x).reshape(-1, width, columns)
    if recording():
        spectrum = torch.matmul(matrices.last[:, None], rows)
    else:
        spectrum = rows.new_empty(2, rows.shape[0], half, columns)
        for plane in range(2):
            torch.bmm(matrices.last[plane].expand(rows.shape[0], half, width), rows, out=spectrum[plane])
    for axis in reversed(range(len(lead))):
        spectrum = _mix(spectrum, lead, axis, matrices.others[axis])
    return spectrum.reshape(2, *lead, half, columns)


def _columns_last(x: Tensor) -> Tensor:
    """Return x (*S, N) contiguous if it is a view of (N, *S): one flat transpose is the fastest way to reorder it."""
    columns_first = x.movedim(-1, 0)
    if not recording() and not x.is_contiguous() and columns_first.is_contiguous():
        return columns_first.flatten(1).t().contiguous().view(x.shape)
    return x


def synthesise(spectrum: Tensor, matrices: Tables) -> Tensor:
    """Return the transpose of ``analyse``: (2, *S', N) → (*S, N)."""
    _, *lead, half, columns = spectrum.shape
    width = matrices.last.shape[2]
    for axis in range(len(lead)):
        spectrum = _mix(spectrum, lead, axis, matrices.others[axis].mT)
    real, imag = spectrum.reshape(2, -1, half, columns).unbind()
    last_r, last_i = (m.mT.expand(real.shape[0], width, half) for m in matrices.last)
    return torch.baddbmm(torch.bmm(last_r, real), last_i, imag).reshape(*lead, width, columns)


def _mix(spectrum: Tensor, lead: Sequence[int], axis: int, matrix: Tensor) -> Tensor:
    """Multiply one complex axis by a (2n, 2n) real form."""
    n, before = lead[axis], math.prod(lead[:axis])
    if before == 1:
        return (matrix @ spectrum.reshape(2 * n, -1)).view(2, n, -1)
    real, imag = spectrum.reshape(2, before, n, -1).unbind()
    parts = (matrix[:n, :n].expand(before, n, n), matrix[n:, :n].expand(before, n, n))
    re, im = product(parts, (real, imag))
    assert im is not None  # both factors have two planes
    return torch.stack((re, im))


class Analyse(torch.autograd.Function):
    """``analyse`` with its transpose as the backward pass: nothing but the matrices is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, last: Tensor, *others: Tensor) -> Tensor:
        """See ``analyse``."""
        ctx.tables = Tables(last, others)
        return analyse(x, ctx.tables)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the images."""
        return Synthesise.apply(grad, None, *_flat(ctx.tables)), *[None] * (1 + len(ctx.tables.others))


class Synthesise(torch.autograd.Function):
    """``synthesise`` plus a bias, with the transpose as the backward pass."""

    @staticmethod
    def forward(ctx: Any, spectrum: Tensor, bias: Tensor | None, last: Tensor, *others: Tensor) -> Tensor:
        """See ``synthesise``; the bias (C) is added to columns (B, C)."""
        ctx.tables = Tables(last, others)
        images = synthesise(spectrum, ctx.tables)
        if bias is not None:
            ctx.bias_size = len(bias)
            images.view(-1, len(bias)).add_(bias)
        return images

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the spectra and of the bias."""
        spectrum = Analyse.apply(grad, *_flat(ctx.tables))
        grad_bias = None
        if ctx.needs_input_grad[1]:
            # The transpose of the inverse transform has the images' mean at frequency 0.
            mean = spectrum[(0,) * (spectrum.ndim - 1)].view(-1, ctx.bias_size).sum(0)
            grad_bias = mean * math.prod(grad.shape[:-1])
        return spectrum, grad_bias, *[None] * (1 + len(ctx.tables.others))


def _flat(matrices: Tables) -> tuple[Tensor, ...]:
    return matrices.last, *matrices.others


def to_spectrum(x: Tensor, matrices: Tables) -> Tensor:
    """Return ``analyse(x, matrices)``, differentiable."""
    return analyse(x, matrices) if recording() else Analyse.apply(x, *_flat(matrices))


def to_images(spectrum: Tensor, matrices: Tables, bias: Tensor | None = None) -> Tensor:
    """Return ``synthesise(spectrum, matrices)``, differentiable, plus a bias (C) on columns (B, C)."""
    if not recording():
        return Synthesise.apply(spectrum, bias, *_flat(matrices))
    images = synthesise(spectrum, matrices)
    if bias is None:
        return images
    return (images.view(*images.shape[:-1], -1, len(bias)) + bias).view(images.shape)
