"""Batched complex matrices as two real tensors, the real and imaginary parts, and their inversion by blocks.

Note [Split-complex]: a complex matrix is a pair (real, imaginary) of real tensors, the second None when it is real.
Real products into contiguous results take the batched-GEMM path of the CPU, a transpose is a view, and a conjugate is
a sign: a complex dtype would copy for every conjugate, and could not be exported. Where the compiled kernels run, one
pass makes both planes; elsewhere, four real products do. Where something follows the operations (``differentiable``),
nothing is updated in place: use what a function returns, not what it was told to add to.

Note [No pivoting]: every matrix inverted here is N = I + K + G with K skew-Hermitian and G positive semi-definite.
Its Hermitian part is at least I, so is that of every Schur complement, so no pivot can vanish and ‖N⁻¹‖ ≤ 1.

Note [LAPACK hang]: batched LU, inverse and solve of CPU torch hang above size ~144 with two threads
(pytorch#141358). LAPACK is only ever asked for leaves of at most 64 rows here; the rest is matrix products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from espalier.nn.kernels import split_complex as kernels
from espalier.nn.precision import differentiable, is_exporting

SplitComplex = tuple[Tensor, Tensor | None]

# Rows of a leaf, and how many matrices are many, so that small leaves pay: LAPACK takes the matrices of a batch one by
# one, a product takes all at once, but every product is a call.
_SMALL_LEAF, _LARGE_LEAF, _MANY = 16, 64, 16
# Numbers per plane that are inverted together: what the temporaries of one part leave in the cache serves the next.
_TOGETHER = 1 << 19
# A GPU waits for launches, not for its cache: on an H100 the kernels of a training step took 3 of its 21 ms, the rest
# was the host's. So all matrices go together there, and leaves are as large as its factorisation takes in one kernel.
_GPU_TOGETHER, _GPU_LEAF = 1 << 27, 32
# Newton's steps double the correct digits once the residual is below 1/2; to get there takes log₂(‖a‖₁‖a‖∞) of them.
_NEWTON_STEPS = 40


def product(
    a: SplitComplex,
    b: SplitComplex,
    *,
    conj_a: bool = False,
    conj_b: bool = False,
    into: SplitComplex | None = None,
    alpha: int = 1,
    add: bool = True,
) -> SplitComplex:
    """Return alpha·a·b, or ``into`` with it added, in place where nothing follows the operations.

    Args:
        a: split-complex (N, p, q); ``conj_a`` takes the complex conjugate.
        b: split-complex (N, q, r); ``conj_b`` likewise.
        into: split-complex (N, p, r) to add to, apart from a and b in memory.
        alpha: factor of the product.
        add: without it ``into``, whatever it holds, becomes the product; nothing may follow the operations then.
    """
    (a_r, a_i), (b_r, b_i) = a, b
    # A sum of nothing (an empty batch) is left to torch: the kernels would write nothing.
    if a_i is not None and b_i is not None and (into is None or into[1] is not None) and a_r.shape[2]:
        pair = None if into is None or into[1] is None else (into[0], into[1])
        if kernels.compiled(a_r, a_i, b_r, b_i, *(pair or ())):
            return kernels.product((a_r, a_i), (b_r, b_i), pair, conj_a=conj_a, conj_b=conj_b, alpha=alpha, add=add)
    followed = differentiable(*a, *b, *(into or ()))
    if into is not None and not followed and not (add and into[0].is_contiguous()):
        # Into a strided result, a batched GEMM takes the slow path.
        start = contiguous(into) if add else None
        return copy_(into, product(a, b, conj_a=conj_a, conj_b=conj_b, into=start, alpha=alpha))
    added = torch.baddbmm if followed else Tensor.baddbmm_

    def first(x: Tensor, y: Tensor, factor: float) -> Tensor:
        if followed:
            return torch.bmm(x, y) if factor == 1 else torch.bmm(x, y) * factor
        return torch.bmm(x, y) if factor == 1 else torch.bmm(x, y).mul_(factor)

    re, im = into or (None, None)
    re = first(a_r, b_r, alpha) if re is None else added(re, a_r, b_r, alpha=alpha)
    if a_i is None or b_i is None:
        return re, im
    sign_a, sign_b = -1 if conj_a else 1, -1 if conj_b else 1
    re = added(re, a_i, b_i, alpha=-alpha * sign_a * sign_b)
    im = first(a_i, b_r, alpha * sign_a) if im is None else added(im, a_i, b_r, alpha=alpha * sign_a)
    return re, added(im, a_r, b_i, alpha=alpha * sign_b)


def transpose(a: SplitComplex) -> SplitComplex:
    """Return the transpose (not the adjoint) as views."""
    return a[0].mT, None if a[1] is None else a[1].mT


def block(a: SplitComplex, rows: slice, columns: slice) -> SplitComplex:
    """Return a block as views."""
    return a[0][:, rows, columns], None if a[1] is None else a[1][:, rows, columns]


def contiguous(a: SplitComplex) -> SplitComplex:
    """Return fresh contiguous parts."""
    layout = torch.contiguous_format
    return a[0].clone(memory_format=layout), None if a[1] is None else a[1].clone(memory_format=layout)


def copy_(target: SplitComplex, source: SplitComplex) -> SplitComplex:
    """Copy parts into views of others, and return those."""
    target[0].copy_(source[0])
    if target[1] is not None and source[1] is not None:
        target[1].copy_(source[1])
    return target


def many(count: int) -> bool:
    """Return whether so many matrices keep all threads busy, one each."""
    return count >= min(_MANY, torch.get_num_threads())


def invert(a: SplitComplex) -> SplitComplex:
    """Invert matrices whose Hermitian part is at least I, by halves.

    With a = [A B; C D], S = D − CA⁻¹B: a⁻¹ = [A⁻¹ + XS⁻¹Y, −XS⁻¹; −S⁻¹Y, S⁻¹], X = A⁻¹B, Y = CA⁻¹. Halving makes
    square products, which a batched GEMM does best.

    Args:
        a: split-complex (N, n, n); left untouched.

    Returns:
        Fresh contiguous parts. See Note [No pivoting] and Note [LAPACK hang].
    """
    count, _, n = a[0].shape
    if a[1] is not None and count >= _MANY and kernels.compiled(a[0], a[1]):
        whole = contiguous(a)
        assert whole[1] is not None
        return kernels.factor_((whole[0], whole[1]), n)
    leaf, together = _SMALL_LEAF if count >= _MANY else _LARGE_LEAF, _TOGETHER
    if a[0].is_cuda:
        leaf, together = _GPU_LEAF, _GPU_TOGETHER
    part = max(1, together // n**2)
    if count <= part:
        return _invert(a, leaf)
    parts = [
        _invert((a[0][i : i + part], None if a[1] is None else a[1][i : i + part]), leaf) for i in range(0, count, part)
    ]
    real, imag = zip(*parts, strict=True)
    return torch.cat(real), None if a[1] is None else torch.cat(imag)


def _invert(a: SplitComplex, leaf: int) -> SplitComplex:
    n = a[0].shape[-1]
    if n <= leaf:
        return _invert_leaf(a)
    half = -(-n // (2 * leaf)) * leaf
    first, last = slice(half), slice(half, n)
    top = _invert(block(a, first, first), leaf)
    x = product(top, block(a, first, last))
    schur = contiguous(block(a, last, last))
    schur = product(block(a, last, first), x, into=schur, alpha=-1)
    corner = _invert(schur, leaf)
    low = product(corner, product(block(a, last, first), top))
    right = product(x, corner)
    return _assemble(product(x, low, into=top), right, low, corner)


def _assemble(top: SplitComplex, right: SplitComplex, low: SplitComplex, corner: SplitComplex) -> SplitComplex:
    """Return [top, −right; −low, corner]."""

    def join(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        if differentiable(a, b, c, d):
            return torch.cat((torch.cat((a, -b), 2), torch.cat((-c, d), 2)), 1)
        half, size = a.shape[-1], a.shape[-1] + d.shape[-1]
        whole = a.new_empty(a.shape[0], size, size)
        whole[:, :half, :half], whole[:, half:, half:] = a, d
        torch.neg(b, out=whole[:, :half, half:])
        torch.neg(c, out=whole[:, half:, :half])
        return whole

    real = join(top[0], right[0], low[0], corner[0])
    if top[1] is None or right[1] is None or low[1] is None or corner[1] is None:
        return real, None
    return real, join(top[1], right[1], low[1], corner[1])


def _invert_leaf(a: SplitComplex) -> SplitComplex:
    if is_exporting() and torch.onnx.is_in_onnx_export():
        return _invert_by_products(a)
    # None is singular (Note [No pivoting]), and to ask the device whether one was would stop a step until it answers.
    if a[1] is None:
        return torch.linalg.inv_ex(a[0]).inverse, None
    inverse = torch.linalg.inv_ex(torch.complex(a[0], a[1])).inverse
    return inverse.real.contiguous(), inverse.imag.contiguous()


def _invert_by_products(a: SplitComplex) -> SplitComplex:
    """Invert by Newton's iteration ``X ← X(2I − aX)`` from ``X = aᴴ/(‖a‖₁‖a‖∞)``: ONNX has no inverse.

    The singular values are at least 1, so the first residual is at most ``1 − 1/(‖a‖₁‖a‖∞)``. A complex matrix is
    inverted as the real one [re, −im; im, re].
    """
    real, imag = a
    n = real.shape[-1]
    m = real if imag is None else torch.cat((torch.cat((real, -imag), 2), torch.cat((imag, real), 2)), 1)
    size = m.abs()
    x = m.mT / (size.sum(1).amax(1) * size.sum(2).amax(1))[:, None, None]
    for _ in range(_NEWTON_STEPS):
        x = 2 * x - torch.matmul(x, torch.matmul(m, x))
    return (x, None) if imag is None else (x[:, :n, :n], x[:, n:, :n])
