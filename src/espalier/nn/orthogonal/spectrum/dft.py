"""The real discrete Fourier transform of images as matrix products, in split-complex form, over one to three axes.

Images come as (*S, N): the spatial axes first, N = batch × channels last. Spectra leave as two tensors (F, N). Both
directions are real-linear maps, so the backward pass of each is the transpose, which is the other one with other
weights.

Note [Half the frequencies]: real images have conjugate spectra at f and −f, so one of each such pair is kept. The last
axis is cut to its first half plus one; in the columns of this half spectrum that are their own mirror images, at 0 and
at half of an even width, the frequency that comes later goes too. Those left follow each other in the half spectrum's
order: 34 of 8 × 5 for images of 8 × 8. The inverse transform counts a frequency twice where it stands for its mirror
image; that is all in which the two directions differ.

Note [DFT as GEMM]: for the 8 to 64 points of these images, one product with a cosine and a sine matrix is faster than
an FFT and the permutations around it. The compiled kernel takes a few columns at a time through all axes at once, by
a fast transform where the number of points is even.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from espalier.nn.kernels import split_complex as kernels
from espalier.nn.orthogonal.spectrum.split_complex import SplitComplex, each, product
from espalier.nn.precision import is_tracing, takes_batches, without_autocast

# Tables are made here whatever the default device is, so that they are the same everywhere.
_HOST = torch.device("cpu")


def counts(size: tuple[int, ...]) -> tuple[int, ...]:
    """Return how many of its frequencies each one of the half spectrum stands for: 0 if left out, 1, or 2 in one.

    See Note [Half the frequencies].
    """
    found: tuple[int, ...] = _kept(_count, size)
    return found


def _count(size: tuple[int, ...]) -> tuple[int, ...]:
    """Make what ``counts`` keeps.

    Numbers here and in the tables come from choices, not sums of conditions, which
    ``torch.compile`` cannot trace where a size is a symbol.
    """
    *lead, width = size
    mirror = [0]
    for n in lead:
        mirror = [row * n + -f % n for row in mirror for f in range(n)]
    halves = [2 * f % width == 0 for f in range(width // 2 + 1)]
    return tuple(
        (2 if row < image else 0) if holds_images and row != image else 1
        for row, image in enumerate(mirror)
        for holds_images in halves
    )


def _kept(build: Callable[..., Any], *arguments: Any) -> Any:
    """Return ``build(*arguments)``, kept for later calls unless what is made now belongs to a graph or a transform."""
    return build(*arguments) if is_tracing() else _keep(build, *arguments)


@functools.lru_cache(maxsize=128)
def _keep(build: Callable[..., Any], *arguments: Any) -> Any:
    with torch.inference_mode(False):  # later calls may be differentiated
        return build(*arguments)


class Tables(NamedTuple):
    """The matrices of one transform: the half-spectrum ones of the last axis, the complex ones of the others."""

    size: tuple[int, ...]
    """Of the images."""
    last: Tensor
    """(2, W//2 + 1, W): cosine and minus sine."""
    others: tuple[SplitComplex, ...]
    """Real and imaginary part (n, n) of e^(−iθ) for every axis but the last."""
    weights: Tensor
    """Of each frequency of the half spectrum, 0 if it is left out."""
    weighted: bool
    """Whether a frequency that is kept has a weight other than 1."""
    kept: Tensor
    """(F): which ones are not left out."""
    place: Tensor
    """Of each frequency of the half spectrum among those kept, 0 if it is left out."""
    packed: Tensor | None
    """All of this as the compiled kernels of a CPU read it."""
    together: int
    """In what powers of two columns from one example come."""


def tables(size: Sequence[int], dtype: torch.dtype, device: torch.device, *, inverse: bool, channels: int) -> Tables:
    """Return the matrices for images of ``size``, with the weights of the inverse transform if asked.

    They are computed in float64 and rounded once, and kept for later calls, except while a graph is being traced.
    Columns are (B, C) with C ``channels``, and no example can tell what else is in its batch.
    """
    found: Tables = _kept(
        _build_tables, tuple(int(n) for n in size), dtype, device, inverse, kernels.together(channels)
    )
    return found


def _build_tables(
    size: tuple[int, ...], dtype: torch.dtype, device: torch.device, inverse: bool, together: int
) -> Tables:
    *lead, width = size
    half, times = width // 2 + 1, counts(size)
    kept = [f for f, count in enumerate(times) if count]
    number = {f: n for n, f in enumerate(kept)}
    if inverse:
        # Frequencies between 0 and half the width stand for those above, too.
        shares = [count * (1 if 2 * (f % half) % width == 0 else 2) / math.prod(size) for f, count in enumerate(times)]
    else:
        shares = [1.0 if count else 0.0 for count in times]
    cos, sin = _angles(half, width)
    weights = torch.tensor(shares, dtype=torch.float64, device=_HOST).to(dtype)
    return Tables(
        size,
        torch.stack((cos, -sin)).to(device, dtype),
        tuple((c.to(device, dtype), -s.to(device, dtype)) for c, s in (_angles(n, n) for n in lead)),
        weights.to(device),
        inverse,
        torch.tensor(kept, device=device),
        torch.tensor([number.get(f, 0) for f in range(len(times))], device=device),
        _packed(size, weights) if device.type == "cpu" else None,
        together,
    )


def _packed(size: tuple[int, ...], weights: Tensor) -> Tensor:
    """Return for every axis, the last one first, its roots of unity and the matrices of its odd part; then the weights.

    The cosines are those of points up to odd/2, the sines those from 1 on.
    """
    *lead, width = size
    parts = []
    for n in (width, *lead):
        roots, odd = _angles(2, n), n // (n & -n)
        parts += [table[1 % n, : n // 2] for table in roots]
        if odd > 1:
            cos, sin = _angles(odd, odd)
            few = odd // 2 + 1
            parts += [kernels.packed_matrix(cos[:few, :few]), kernels.packed_matrix(sin[1:few, 1:few])]
    return torch.cat([*(part.to(weights.dtype) for part in parts), weights])


class Lags(NamedTuple):
    """How taps lie to one another: the lags o_t − o_s of their pairs, one of every two that differ by sign, 0 first."""

    pairs: Tensor
    """Of (T·T) pairs (s, t), those with such a lag."""
    lag: Tensor
    """The lag of each of these pairs."""
    cos: Tensor
    """(F, L)"""
    sin: Tensor
    """(F, L)"""


class Angles(NamedTuple):
    """Cosine and sine of the angle of every tap at every frequency, each (F, T), and where they are few the lags."""

    cos: Tensor
    sin: Tensor
    lags: Lags | None = None


def tap_angles(
    size: Sequence[int], offsets: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device
) -> Angles:
    """Return the angles of a correlation's taps: tap o turns by ``2π Σ_a f_a o_a / n_a`` at the frequency f.

    Args:
        size: of the images, (n_a). Frequencies are those of ``rfft``, in its order.
        offsets: per axis, where its taps lie relative to the output pixel.
        dtype: of the result, which is computed in float64 and kept for later calls.
        device: of the result.
    """
    found: Angles = _kept(_build_angles, tuple(int(n) for n in size), tuple(tuple(o) for o in offsets), dtype, device)
    return found


def _build_angles(
    size: tuple[int, ...], offsets: tuple[tuple[int, ...], ...], dtype: torch.dtype, device: torch.device
) -> Angles:
    places = list(itertools.product(*offsets))
    cos, sin = _turned(size, places, dtype, device)
    # Products of pairs of taps against those of four real matrices at every frequency; a graph keeps to one way.
    if is_tracing() or not 1 < cos.shape[1] ** 2 < 3 * len(cos):
        return Angles(cos, sin)
    lags = [tuple(b - a for a, b in zip(one, two, strict=True)) for one in places for two in places]
    zero = (0,) * len(size)
    # Of two lags that differ by sign the larger one: tuples are compared by their first axes first.
    kept = sorted({lag for lag in lags if lag >= zero})
    pairs = [pair for pair, lag in enumerate(lags) if lag >= zero]
    number = {lag: index for index, lag in enumerate(kept)}
    which = torch.tensor([number[lags[pair]] for pair in pairs], device=device)
    return Angles(cos, sin, Lags(torch.tensor(pairs, device=device), which, *_turned(size, kept, dtype, device)))


def _turned(
    size: tuple[int, ...], places: list[tuple[int, ...]], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return cosine and sine (F, T) of 2π Σ_a f_a o_a / n_a for places o."""
    *lead, width = size
    along = [torch.arange(n, device=_HOST) for n in (*lead, width // 2 + 1)]
    counted = torch.tensor([f for f, count in enumerate(counts(size)) if count], device=_HOST)
    frequencies = torch.cartesian_prod(*along).view(-1, len(size))[counted]
    theta = torch.zeros(len(counted), len(places), dtype=torch.float64, device=_HOST)
    offsets = torch.tensor(places, device=_HOST)
    for axis in reversed(range(len(size))):
        turns = torch.outer(frequencies[:, axis], offsets[:, axis]) % size[axis]  # as integers: exact at any size
        theta += turns.double() * (2 * math.pi / size[axis])
    return theta.cos().to(device, dtype), theta.sin().to(device, dtype)


def _angles(rows: int, n: int) -> tuple[Tensor, Tensor]:
    row, column = torch.arange(rows, device=_HOST), torch.arange(n, device=_HOST)
    turns = torch.outer(row, column) % n  # reduced as integers: exact at any size
    theta = turns.double() * (2 * math.pi / n)
    return theta.cos(), theta.sin()


def rfft(x: Tensor, matrices: Tables) -> SplitComplex:
    """Return the planes (F, N) of the weighted transform of x (*S, N)."""
    if matrices.packed is not None and kernels.compiled(x):
        return kernels.rfft(x, matrices.packed, len(matrices.kept), together=matrices.together)
    *lead, width, columns = x.shape
    # Every size is named here and below: an empty batch leaves nothing to infer one from.
    if not is_tracing() and kernels.columns_first(x):  # one flat transpose is the fastest way to reorder it
        x = x.movedim(-1, 0).flatten(1).t().contiguous()
    rows = x.reshape(math.prod(lead), width, columns)
    planes: SplitComplex = tuple(torch.matmul(table, rows) for table in matrices.last)
    for axis in reversed(range(len(lead))):
        planes = _mix(planes, lead, axis, matrices.others[axis], conj=False)
    planes = each(lambda plane: plane.reshape(math.prod(lead) * len(matrices.last[0]), columns), planes)
    if len(matrices.kept) != len(matrices.place):
        planes = each(lambda plane: plane.index_select(0, matrices.kept), planes)
    if matrices.weighted:
        weights = matrices.weights.index_select(0, matrices.kept)[:, None]
        planes = each(lambda plane: plane * weights, planes)
    return planes


def irfft(
    spectrum: SplitComplex, matrices: Tables, bias: Tensor | None = None, *, columns_first: bool = False
) -> Tensor:
    """Return the transpose of ``rfft``, plus a bias (C) on columns (B, C): split-complex (F, N) → (*S, N).

    ``columns_first`` asks for images that lie in memory as (N, *S).
    """
    if matrices.packed is not None and kernels.compiled(*spectrum, *(() if bias is None else (bias,))):
        packed, size, together = matrices.packed, matrices.size, matrices.together
        return kernels.irfft(spectrum, packed, size, bias, first=columns_first, together=together)
    _, half, width = matrices.last.shape
    lead, columns = matrices.size[:-1], spectrum[0].shape[-1]
    if matrices.weighted or len(matrices.kept) != len(matrices.place):
        weights = matrices.weights[:, None]
        spectrum = each(lambda plane: plane.index_select(0, matrices.place) * weights, spectrum)
    for axis in range(len(lead)):
        spectrum = _mix(spectrum, lead, axis, matrices.others[axis], conj=True)
    real, imag = each(lambda plane: plane.reshape(math.prod(lead), half, columns), spectrum)
    last_r, last_i = (m.mT.expand(real.shape[0], width, half) for m in matrices.last)
    images = torch.baddbmm(torch.bmm(last_r, real), last_i, imag)
    if bias is not None:
        shape = images.shape
        images = (images.reshape(*shape[:-1], columns // len(bias), len(bias)) + bias).view(shape)
    images = images.reshape(*lead, width, columns)
    if columns_first and lead:
        flat = images.reshape(math.prod(lead) * width, columns)
        images = flat.t().contiguous().view(columns, *lead, width).movedim(0, -1)
    return images


def _mix(spectrum: SplitComplex, lead: Sequence[int], axis: int, matrix: SplitComplex, *, conj: bool) -> SplitComplex:
    """Multiply one axis by a complex (n, n) matrix."""
    n, before = lead[axis], math.prod(lead[:axis])
    parts = each(lambda plane: plane.expand(before, n, n), matrix)
    rows = each(lambda plane: plane.reshape(before, n, plane.numel() // (before * n)), spectrum)
    return product(parts, rows, conj_a=conj)


class _Rfft(torch.autograd.Function):
    """``rfft`` with its transpose as the backward pass: nothing but the matrices is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrices: Tables) -> SplitComplex:
        """See ``rfft``."""
        ctx.tables, ctx.columns_first = matrices, kernels.columns_first(x)
        return rfft(x, matrices)

    @staticmethod
    @takes_batches
    @without_autocast
    def backward(ctx: Any, real: Tensor, imag: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the images, in their layout."""
        if is_tracing():
            return irfft((real, imag), ctx.tables, columns_first=ctx.columns_first), None
        return _Irfft.apply(real, imag, None, ctx.tables, ctx.columns_first), None


class _Irfft(torch.autograd.Function):
    """``irfft``, with the transpose as the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, real: Tensor, imag: Tensor, bias: Tensor | None, matrices: Tables, columns_first: bool
    ) -> Tensor:
        """See ``irfft``."""
        ctx.tables = matrices
        ctx.bias_size = 0 if bias is None else len(bias)
        # No view: torch would refuse to let one that a function returns be changed in place.
        return irfft((real, imag), matrices, bias, columns_first=columns_first).data

    @staticmethod
    @takes_batches
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the spectra and of the bias."""
        real, imag = to_spectrum(grad, ctx.tables)
        grad_bias = None
        if ctx.needs_input_grad[2]:
            # The transpose of the inverse transform has the images' mean at frequency 0.
            mean = real[0].view(-1, ctx.bias_size).sum(0)
            grad_bias = mean * math.prod(grad.shape[:-1])
        return real, imag, grad_bias, None, None


def to_spectrum(x: Tensor, matrices: Tables) -> SplitComplex:
    """Return ``rfft(x, matrices)``, differentiable."""
    if is_tracing():
        return rfft(x, matrices)
    planes: SplitComplex = _Rfft.apply(x, matrices)
    return planes


def to_images(spectrum: SplitComplex, matrices: Tables, bias: Tensor | None = None) -> Tensor:
    """Return ``irfft(spectrum, matrices, bias)``, differentiable."""
    if is_tracing():
        return irfft(spectrum, matrices, bias)
    images: Tensor = _Irfft.apply(*spectrum, bias, matrices, False)
    return images
