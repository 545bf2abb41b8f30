"""The Cayley transform of matrices: an orthogonal, semi-orthogonal or unitary matrix for any matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from espalier.errors import EspalierError
from espalier.nn.orthogonal.spectrum.split_complex import (
    Planes,
    add_gram_,
    block,
    contiguous,
    invert,
    product,
    transpose,
)
from espalier.nn.precision import outside_graphs, without_autocast


def cayley(matrix: Tensor) -> Tensor:
    """Return the Cayley transform ``Q = [2N⁻¹ − I; −2VN⁻¹]``, ``N = I + U − Uᴴ + VᴴV``, of ``W = [U; V]``.

    U is the top square block and V the rest. N has Hermitian part ⪰ I, so the transform exists for every W, and
    ``QᴴQ = I``. Wide matrices go through the transpose and get orthonormal rows. ``2N⁻¹ − I`` is the paper's
    ``(I + A)⁻¹(I − A)`` with less rounding. Matrices of any size are safe with any number of threads (see Note
    [LAPACK hang]); half-precision ones are computed in float32.

    Args:
        matrix: (..., rows, columns), real or complex.

    Returns:
        Q, of the shape and dtype of the matrix; differentiable once.

    Raises:
        EspalierError: fewer than two dimensions, an empty matrix, or integers.

    Source: arXiv 2104.07167, section 4.
    """
    if matrix.ndim < 2 or 0 in matrix.shape[-2:]:
        raise EspalierError(f"matrix of shape {tuple(matrix.shape)} has no Cayley transform: give (..., rows, columns)")
    if not (matrix.is_floating_point() or matrix.is_complex()):
        raise EspalierError(f"matrix of {matrix.dtype} has no Cayley transform: convert it to floating point")
    if matrix.is_complex():
        return torch.complex(*cayley_planes(matrix.real, matrix.imag))
    q: Tensor = _transform(matrix.to(torch.promote_types(matrix.dtype, torch.float32)), None)[0]
    return q.to(matrix.dtype)


def cayley_planes(real: Tensor, imag: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``cayley`` of complex matrices kept as two real tensors, in the same form.

    Args:
        real: real parts (..., rows, columns), float32 or float64.
        imag: imaginary parts.
    """
    q: tuple[Tensor, Tensor] = _transform(real, imag)
    return q


@outside_graphs
def _transform(real: Tensor, imag: Tensor | None) -> Any:
    with torch.autocast(real.device.type, enabled=False):
        return _Cayley.apply(real, imag)


class _Cayley(torch.autograd.Function):
    """Planes of W (..., rows, columns) in, planes of Q out; the second plane is None for real matrices."""

    @staticmethod
    def forward(ctx: Any, real: Tensor, imag: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the planes of Q; the formula stands in ``cayley``."""
        w, wide = _as_batch(real, imag)
        u, v = split(w)
        n = contiguous(u)
        n[0].sub_(u[0].mT).diagonal(dim1=1, dim2=2).add_(1)
        if n[1] is not None and u[1] is not None:
            n[1].add_(u[1].mT)
        if v is not None:
            add_gram_(n, v)
        inverse = invert(n)
        ctx.wide = wide
        ctx.save_for_backward(*inverse, *(v or (None, None)))
        return _as_given(_assemble(inverse, v), wide, real.shape)

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx: Any, grad_r: Tensor, grad_i: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """∂N = −2N⁻ᴴ(G₁ − VᴴG₂)N⁻ᴴ, ∂U = ∂N − ∂Nᴴ, ∂V = −2G₂N⁻ᴴ + V(∂N + ∂Nᴴ), for G = [G₁; G₂]."""
        inverse, v = ctx.saved_tensors[:2], ctx.saved_tensors[2:]
        g, _ = _as_batch(grad_r, grad_i)
        head, low = split(g)
        head = contiguous(head)
        if low is not None:
            product(transpose(v), low, conj_a=True, into=head, alpha=-1)
        adjoint = transpose(inverse)
        grad_n = product(product(adjoint, head, conj_a=True), adjoint, conj_b=True, alpha=-2)
        real, imag = grad_n
        grad_u = real - real.mT, None if imag is None else imag + imag.mT
        if low is None:
            return _as_given(grad_u, ctx.wide, grad_r.shape)
        grad_v = product(low, adjoint, conj_b=True, alpha=-2)
        product(v, (real + real.mT, None if imag is None else imag - imag.mT), into=grad_v)
        return _as_given(stack(grad_u, grad_v), ctx.wide, grad_r.shape)


def split(w: Planes) -> tuple[Planes, Planes | None]:
    """Return the top square block of tall matrices and the rest, which is None for square ones."""
    rows, columns = w[0].shape[-2:]
    if rows == columns:
        return w, None
    every = slice(None)
    return block(w, slice(columns), every), block(w, slice(columns, rows), every)


def stack(top: Planes, below: Planes) -> Planes:
    """Return [top; below]."""
    real = torch.cat((top[0], below[0]), 1)
    return real, None if top[1] is None or below[1] is None else torch.cat((top[1], below[1]), 1)


def _assemble(inverse: Planes, v: Planes | None) -> Planes:
    """Return [2N⁻¹ − I; −2VN⁻¹]."""
    q: Planes = inverse[0] * 2, None if inverse[1] is None else inverse[1] * 2
    q[0].diagonal(dim1=1, dim2=2).sub_(1)
    return q if v is None else stack(q, product(v, inverse, alpha=-2))


def _as_batch(real: Tensor, imag: Tensor | None) -> tuple[Planes, bool]:
    """Return (..., rows, columns) as one batch of tall matrices, and whether they were wide."""
    wide = real.shape[-1] > real.shape[-2]
    planes = (None if plane is None else plane.reshape(-1, *plane.shape[-2:]) for plane in (real, imag))
    re, im = (plane.mT if plane is not None and wide else plane for plane in planes)
    assert re is not None
    return (re, im), wide


def _as_given(q: Planes, wide: bool, shape: torch.Size) -> tuple[Tensor, Tensor | None]:
    """Return tall matrices in the shape that came in."""
    re, im = transpose(q) if wide else q
    return re.reshape(shape), None if im is None else im.reshape(shape)
