"""Batched complex matrices as two real tensors, the real and imaginary parts, and their inversion by blocks.

Note [Split-complex]: a complex matrix is a pair (real, imaginary) of real tensors, and a real one a tuple of one.
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

from collections.abc import Callable

import torch
from torch import Tensor

from espalier.nn.kernels import split_complex as kernels
from espalier.nn.kernels.split_complex import SplitComplex
from espalier.nn.precision import differentiable, is_exporting

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
    # A sum of nothing (an empty batch) is left to torch: the kernels would write nothing.
    if len(a) == 2 and a[0].shape[2] and kernels.compiled(*a, *b, *(into or ())):
        return kernels.product(a, b, into, conj_a=conj_a, conj_b=conj_b, alpha=alpha, add=add)
    followed = differentiable(*a, *b, *(into or ()))
    if into is not None and not followed and not (add and into[0].is_contiguous()):
        # Into a strided result, a batched GEMM takes the slow path.
        start = contiguous(into) if add else None
        return copy_(into, product(a, b, conj_a=conj_a, conj_b=conj_b, into=start, alpha=alpha))

    def added(total: Tensor | None, x: Tensor, y: Tensor, factor: int) -> Tensor:
        if total is not None:
            return (torch.baddbmm if followed else Tensor.baddbmm_)(total, x, y, alpha=factor)
        made = torch.bmm(x, y)
        if factor == 1:
            return made
        return made * factor if followed else made.mul_(factor)

    real = added(None if into is None else into[0], a[0], b[0], alpha)
    if len(a) == 1:
        return (real,)
    sign_a, sign_b = -1 if conj_a else 1, -1 if conj_b else 1
    real = added(real, a[1], b[1], -alpha * sign_a * sign_b)
    imag = added(None if into is None else into[1], a[1], b[0], alpha * sign_a)
    return real, added(imag, a[0], b[1], alpha * sign_b)


def each(function: Callable[..., Tensor], *parts: SplitComplex) -> SplitComplex:
    """Apply ``function`` to the real parts, and to the imaginary ones if there are any."""
    return tuple(function(*planes) for planes in zip(*parts, strict=True))


def transpose(a: SplitComplex) -> SplitComplex:
    """Return the transpose (not the adjoint) as views."""
    return each(lambda plane: plane.mT, a)


def block(a: SplitComplex, rows: slice, columns: slice) -> SplitComplex:
    """Return a block as views."""
    return each(lambda plane: plane[:, rows, columns], a)


def beside(left: SplitComplex, right: SplitComplex) -> SplitComplex:
    """Return the columns of both."""
    return each(lambda *planes: torch.cat(planes, -1), left, right)


def contiguous(a: SplitComplex) -> SplitComplex:
    """Return fresh contiguous parts."""
    return each(lambda plane: plane.clone(memory_format=torch.contiguous_format), a)


def copy_(target: SplitComplex, source: SplitComplex) -> SplitComplex:
    """Copy parts into views of others, and return those."""
    return each(Tensor.copy_, target, source)


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
    if len(a) == 2 and count >= _MANY and kernels.compiled(*a):
        return kernels.factor_(contiguous(a), n)
    leaf, together = _SMALL_LEAF if count >= _MANY else _LARGE_LEAF, _TOGETHER
    if a[0].is_cuda:
        leaf, together = _GPU_LEAF, _GPU_TOGETHER
    part = max(1, together // n**2)
    if count <= part:
        return _invert(a, leaf)
    parts = [_invert(each(lambda plane, i=i: plane[i : i + part], a), leaf) for i in range(0, count, part)]
    return each(lambda *planes: torch.cat(planes), *parts)


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
    return each(_assemble, product(x, low, into=top), right, low, corner)


def _assemble(top: Tensor, right: Tensor, low: Tensor, corner: Tensor) -> Tensor:
    """Return [top, −right; −low, corner]."""
    if differentiable(top, right, low, corner):
        return torch.cat((torch.cat((top, -right), 2), torch.cat((-low, corner), 2)), 1)
    half, size = top.shape[-1], top.shape[-1] + corner.shape[-1]
    whole = top.new_empty(top.shape[0], size, size)
    whole[:, :half, :half], whole[:, half:, half:] = top, corner
    torch.neg(right, out=whole[:, :half, half:])
    torch.neg(low, out=whole[:, half:, :half])
    return whole


def _invert_leaf(a: SplitComplex) -> SplitComplex:
    if is_exporting() and torch.onnx.is_in_onnx_export():
        return _invert_by_products(a)
    # None is singular (Note [No pivoting]), and to ask the device whether one was would stop a step until it answers.
    if len(a) == 1:
        return (torch.linalg.inv_ex(a[0]).inverse,)
    inverse = torch.linalg.inv_ex(torch.complex(*a)).inverse
    return inverse.real.contiguous(), inverse.imag.contiguous()


def _invert_by_products(a: SplitComplex) -> SplitComplex:
    """Invert by Newton's iteration ``X ← X(2I − aX)`` from ``X = aᴴ/(‖a‖₁‖a‖∞)``: ONNX has no inverse.

    The singular values are at least 1, so the first residual is at most ``1 − 1/(‖a‖₁‖a‖∞)``. A complex matrix is
    inverted as the real one [re, −im; im, re].
    """
    n = a[0].shape[-1]
    m = a[0] if len(a) == 1 else torch.cat((torch.cat((a[0], -a[1]), 2), torch.cat((a[1], a[0]), 2)), 1)
    size = m.abs()
    x = m.mT / (size.sum(1).amax(1) * size.sum(2).amax(1))[:, None, None]
    for _ in range(_NEWTON_STEPS):
        x = 2 * x - torch.matmul(x, torch.matmul(m, x))
    return tuple(x[:, part * n : part * n + n, :n] for part in range(len(a)))
