"""Batched complex matrices as two real planes, and their inversion by blocks.

Note [Planes]: a complex matrix is a pair (real, imaginary) of real tensors, the second None when the matrix is real.
Real products into contiguous results take the batched-GEMM path of the CPU, a transpose is a view, and a conjugate is
a sign: a complex dtype would copy for every conjugate, and could not be exported.

Note [No pivoting]: every matrix inverted here is N = I + K + G with K skew-Hermitian and G positive semi-definite.
Its Hermitian part is at least I, so is that of every Schur complement, so no pivot can vanish and ‖N⁻¹‖ ≤ 1.

Note [LAPACK hang]: batched LU, inverse and solve of CPU torch hang above size ~144 with two threads
(pytorch#141358). LAPACK is only ever asked for leaves of at most ``_LEAF`` rows here; the rest is matrix products.
"""

from __future__ import annotations

import torch
from torch import Tensor

Planes = tuple[Tensor, Tensor | None]

_LEAF = 8


def product(
    a: Planes,
    b: Planes,
    *,
    conj_a: bool = False,
    conj_b: bool = False,
    into: Planes | None = None,
    alpha: float = 1.0,
) -> Planes:
    """Return a·b, or add alpha·a·b to ``into`` in place.

    Args:
        a: planes (N, p, q); ``conj_a`` takes the complex conjugate.
        b: planes (N, q, r); ``conj_b`` likewise.
        into: planes (N, p, r) to add to; contiguous ones are fast.
        alpha: factor of the product.
    """
    (a_r, a_i), (b_r, b_i) = a, b
    if into is None:
        re = torch.bmm(a_r, b_r) if alpha == 1.0 else torch.bmm(a_r, b_r).mul_(alpha)
        im = None
    else:
        re, im = into
        re.baddbmm_(a_r, b_r, alpha=alpha)
    if a_i is None or b_i is None:
        return re, im
    sign_a, sign_b = -1.0 if conj_a else 1.0, -1.0 if conj_b else 1.0
    re.baddbmm_(a_i, b_i, alpha=-alpha * sign_a * sign_b)
    if im is None:
        im = torch.bmm(a_i, b_r)
        if alpha * sign_a != 1.0:
            im.mul_(alpha * sign_a)
    else:
        im.baddbmm_(a_i, b_r, alpha=alpha * sign_a)
    im.baddbmm_(a_r, b_i, alpha=alpha * sign_b)
    return re, im


def transpose(a: Planes) -> Planes:
    """Return the transpose (not the adjoint) as views."""
    return a[0].mT, None if a[1] is None else a[1].mT


def block(a: Planes, rows: slice, columns: slice) -> Planes:
    """Return a block as views."""
    return a[0][:, rows, columns], None if a[1] is None else a[1][:, rows, columns]


def contiguous(a: Planes) -> Planes:
    """Return fresh contiguous planes."""
    layout = torch.contiguous_format
    return a[0].clone(memory_format=layout), None if a[1] is None else a[1].clone(memory_format=layout)


def copy_(target: Planes, source: Planes) -> None:
    """Copy planes into views of others."""
    target[0].copy_(source[0])
    if target[1] is not None and source[1] is not None:
        target[1].copy_(source[1])


def add_gram_(n: Planes, v: Planes) -> None:
    """Add VᴴV to ``n`` (N, q, q) in place, for V of shape (N, p, q)."""
    product(transpose(v), v, conj_a=True, into=n)


def invert_(a: Planes) -> Planes:
    """Invert matrices whose Hermitian part is at least I, in place, by blocked Gauss-Jordan elimination.

    Args:
        a: contiguous planes (N, n, n), overwritten by the inverse.

    Returns:
        The same planes. See Note [No pivoting] and Note [LAPACK hang].
    """
    n = a[0].shape[-1]
    if n <= _LEAF:
        _invert_leaf_(a)
        return a
    width = _LEAF if n <= 32 else 16 if n <= 96 else 32 if n <= 192 else 64
    for start in range(0, n, width):
        _eliminate_(a, slice(start, min(start + width, n)))
    return a


def _invert_leaf_(a: Planes) -> None:
    if a[1] is None:
        a[0].copy_(torch.linalg.inv(a[0]))
        return
    inverse = torch.linalg.inv(torch.complex(a[0], a[1]))
    a[0].copy_(inverse.real)
    a[1].copy_(inverse.imag)


def _eliminate_(a: Planes, pivot: slice) -> None:
    """Exchange the pivot block's variables: rows become D·rows, everything else loses column·D·row, all in one update.

    With the pivot's rows and columns of ``a`` zeroed, its own column block set to −I and its own row block to I, the
    one update a −= column·(D·row) does all four cases.
    """
    everything = slice(None)
    inverse = invert_(contiguous(block(a, pivot, pivot)))
    column = contiguous(block(a, everything, pivot))
    row = product(inverse, block(a, pivot, everything))
    copy_(block(row, everything, pivot), inverse)
    column[0][:, pivot] = 0
    column[0][:, pivot].diagonal(dim1=-2, dim2=-1).fill_(-1)
    if column[1] is not None:
        column[1][:, pivot] = 0
    for plane in a:
        if plane is not None:
            plane[:, pivot] = 0
            plane[:, :, pivot] = 0
    if a[1] is None or column[1] is None or row[1] is None:
        a[0].baddbmm_(column[0], row[0], alpha=-1)
        return
    # One product with twice the depth instead of two: thin panels are what a GEMM does worst.
    row_both = torch.cat((row[0], row[1]), dim=1)
    a[0].baddbmm_(torch.cat((column[0], -column[1]), dim=2), row_both, alpha=-1)
    a[1].baddbmm_(torch.cat((column[1], column[0]), dim=2), row_both, alpha=-1)
