"""Apply an orthogonal spectrum to a batch without forming it, with a hand-written backward pass.

Per frequency f with angles θ_f,t of the taps, Ŵ = Σ_t w_t e^(iθ_f,t); wide matrices go through the transpose. With U
the top square block of Ŵ, V the rest, N = I + U − Uᴴ + VᴴV and z the solution of the system:

    square  N z = x                y = 2z − x
    tall    N z = x                y = [2z − x; −2Vz]
    wide    Nᵀz = x₁ − Vᵀx₂        y = 2z − x₁

(arXiv 2104.07167, section 4, with Q = 2N⁻¹ − I in place of N⁻¹(I − A): one product fewer and less rounding.) Batches
are rows here, so N z = x reads z·Nᵀ = x. Gradients are those of real planes: G = ∂ℓ/∂re + i·∂ℓ/∂im.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from espalier.nn.kernels.planes import Pair
from espalier.nn.orthogonal.spectrum.dft import Angles
from espalier.nn.orthogonal.spectrum.factor import factor_, solve
from espalier.nn.orthogonal.spectrum.split_complex import Planes, add_gram_, contiguous, product, transpose
from espalier.nn.precision import without_autocast


def system(taps: Tensor, angles: Angles) -> tuple[Planes, Planes | None]:
    """Return the planes of N (F·G, n, n) and, unless square, of V (F·G, m, n).

    Args:
        taps: scaled kernel (T, G, rows, n) with rows ≥ n, already transposed if the operator is wide.
        angles: of every tap; the matrices of the G groups of one frequency follow each other.
    """
    count, _, rows, n = taps.shape
    top = taps[:, :, :n]
    frequencies = angles.cos.shape[0]

    def emit(table: Tensor, matrices: Tensor) -> Tensor:
        return (table @ matrices.reshape(count, -1)).view(-1, matrices.shape[2], n)

    # U − Uᴴ is linear in the taps: antisymmetric real part, symmetric imaginary part, one product each.
    n_planes = emit(angles.cos, top - top.mT), emit(angles.sin, top + top.mT)
    n_planes[0].diagonal(dim1=1, dim2=2).add_(1)
    assert n_planes[0].shape[0] == frequencies * taps.shape[1]
    if rows == n:
        return n_planes, None
    v = emit(angles.cos, taps[:, :, n:]), emit(angles.sin, taps[:, :, n:])
    add_gram_(n_planes, v)
    return n_planes, v


class ApplyCayley(torch.autograd.Function):
    """Planes of the images (F·G, B, cin) and the taps in, planes of the outputs (F·G, B, cout) out."""

    @staticmethod
    def forward(ctx: Any, real: Tensor, imag: Tensor, taps: Tensor, cos: Tensor, sin: Tensor, wide: bool) -> Pair:
        """Return the planes of y; the formulas stand at the top of the file."""
        angles, x = Angles(cos, sin), (real, imag)
        n_planes, v = system(taps, angles)
        n = n_planes[0].shape[-1]
        factor = factor_(n_planes)
        x2: Pair | None = None
        if wide and v is not None:
            x, x2 = _split(x, n)
            right = _both(contiguous(x))
            product(x2, v, into=right, alpha=-1)
            z = _both(solve(right, factor))
        else:
            z = _both(solve(x, factor, transposed=not wide))
        y = _twice_minus(z, x, n if wide else taps.shape[2])
        if v is not None and not wide:
            _copy_right(y, _both(product(z, transpose(v), alpha=-2)))
        ctx.wide, ctx.angles, ctx.shape = wide, angles, taps.shape
        ctx.save_for_backward(*_both(factor), *z, *(_both(v) if v else ()), *(x2 or ()))
        return y

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx: Any, real: Tensor, imag: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the images and of the taps."""
        factor, z, *rest = zip(ctx.saved_tensors[::2], ctx.saved_tensors[1::2], strict=True)
        v, x2 = rest[0] if rest else None, rest[1] if len(rest) > 1 else None
        n = factor[0].shape[-1]
        steps = _backward_wide if ctx.wide else _backward_tall
        grad_x, grad_n, grad_v = steps((real, imag), factor, z, v, x2, n, ctx.needs_input_grad[2])
        grad_taps = None if grad_n is None else _to_taps(grad_n, grad_v, v, ctx.angles, ctx.shape)
        return *grad_x, grad_taps, None, None, None


def _split(a: Pair, n: int) -> tuple[Pair, Pair]:
    """Return the first n columns, contiguous, and a view of the others."""
    head = _both(contiguous((a[0][:, :, :n], a[1][:, :, :n])))
    return head, (a[0][:, :, n:], a[1][:, :, n:])


def _twice_minus(z: Pair, x: Pair, columns: int) -> Pair:
    """Return 2z − x in one pass, with room for more columns on the right."""
    count, batch, n = x[0].shape
    y = x[0].new_empty(count, batch, columns), x[0].new_empty(count, batch, columns)
    for out, part, minus in zip(y, z, x, strict=True):
        torch.lerp(minus, part, 2.0, out=out[:, :, :n])
    return y


def _copy_right(y: Pair, low: Pair) -> None:
    """Fill the last columns of y."""
    for out, part in zip(y, low, strict=True):
        out[:, :, -part.shape[-1] :].copy_(part)


def _both(a: Planes) -> Pair:
    assert a[1] is not None
    return a[0], a[1]


Gradients = tuple[Pair, Planes | None, Planes | None]


def _backward_tall(
    grad: Pair, factor: Planes, z: Planes, v: Planes | None, _: Planes | None, n: int, need_taps: bool
) -> Gradients:
    """Nᴴu = g₁ − Vᴴg₂, ∂x = 2u − g₁, ∂N = −2uzᴴ, ∂V = −2g₂zᴴ."""
    head, low = (grad, None) if v is None else _split(grad, n)
    right = head
    if v is not None and low is not None:
        right = _both(contiguous(head))
        product(low, v, conj_b=True, into=right, alpha=-1)
    u = _both(solve(right, factor, conj=True))
    grad_x = _twice_minus(u, head, n)
    if not need_taps:
        return grad_x, None, None
    # G = −2uzᴴ: rows are batches, so it is −2(rows of u)ᵀ·conj(rows of z).
    grad_n = product(transpose(u), z, conj_b=True, alpha=-2)
    grad_v = None if low is None else product(transpose(low), z, conj_b=True, alpha=-2)
    return grad_x, grad_n, grad_v


def _backward_wide(
    grad: Pair, factor: Planes, z: Planes, v: Planes | None, x2: Planes | None, n: int, need_taps: bool
) -> Gradients:
    """conj(N)s = g, ∂x₁ = 2s − g, ∂x₂ = −2conj(V)s, ∂N = −2conj(z)sᵀ, ∂V = −2conj(x₂)sᵀ."""
    assert v is not None
    assert x2 is not None
    s = _both(solve(grad, factor, transposed=True, conj=True))
    grad_x = _twice_minus(s, grad, n + x2[0].shape[-1])
    _copy_right(grad_x, _both(product(s, transpose(v), conj_b=True, alpha=-2)))
    if not need_taps:
        return grad_x, None, None
    grad_n = product(transpose(z), s, conj_a=True, alpha=-2)
    grad_v = product(transpose(x2), s, conj_a=True, alpha=-2)
    return grad_x, grad_n, grad_v


def _to_taps(grad_n: Planes, grad_v: Planes | None, v: Planes | None, angles: Angles, shape: tuple[int, ...]) -> Tensor:
    """Carry ∂N and ∂V back to the taps: ∂V gains V(∂N + ∂Nᴴ); ∂w_t = Σ_f of the tap's cosine and sine parts."""
    count, groups, _, n = shape
    real, imag = _both(grad_n)

    def gather(table: Tensor, planes: Tensor) -> Tensor:
        return (table.mT @ planes.reshape(table.shape[0], -1)).view(count, groups, -1, n)

    skew, symmetric = gather(angles.cos, real), gather(angles.sin, imag)
    top = (skew - skew.mT).add_(symmetric).add_(symmetric.mT)
    if grad_v is None or v is None:
        return top
    hermitian = real + real.mT, imag - imag.mT
    product(v, hermitian, into=grad_v)
    v_r, v_i = _both(grad_v)
    return torch.cat((top, gather(angles.cos, v_r) + gather(angles.sin, v_i)), dim=2)


def apply_cayley(x: Pair, taps: Tensor, angles: Angles, *, wide: bool) -> Pair:
    """Return the orthogonal operator of ``taps`` applied to planes ``x``; see ``ApplyCayley``."""
    result: Pair = ApplyCayley.apply(*x, taps, angles.cos, angles.sin, wide)
    return result
