"""The algebra of the Cayley transform, once: of one matrix or of a spectrum, applied to a batch or formed.

A matrix is Ŵ = Σ_t w_t e^(iθ_f,t) at every frequency f, with angles θ of the taps; one real matrix is one tap at angle
zero. Wide matrices go through the transpose. With U the top square block of Ŵ, V the rest, N = I + U − Uᴴ + VᴴV and
z the solution of the system:

    square  N z = x                y = 2z − x
    tall    N z = x                y = [2z − x; −2Vz]
    wide    Nᵀz = x₁ − Vᵀx₂        y = 2z − x₁

(arXiv 2104.07167, section 4, with Q = 2N⁻¹ − I in place of N⁻¹(I − A): one product fewer and less rounding.) Batches
are rows here, so N z = x reads z·Nᵀ = x. With x = I the solution is Qᵀ itself, and z = N⁻ᵀ. Gradients are those of
real parts: G = ∂ℓ/∂re + i·∂ℓ/∂im.

Note [Twice differentiable]: the autograd function returns z beside y. Nobody uses it, so it costs nothing, but the
backward pass reads it as an output of the forward one: under ``create_graph`` its gradient finds the way back here.
What else the backward pass needs (N⁻¹ and V) it then computes again from the taps, by the same code on tensors that
autograd follows.

Note [Pairs of taps]: VᴴV = Σ_st v_sᵀv_t e^(i(θ_t − θ_s)) is the spectrum of an autocorrelation, R_d = Σ v_sᵀv_t over
the pairs of lag d. Nine taps have 25 lags, of which 13 do, as R_−d = R_dᵀ: 81 real products of n × m × n and one of a
table with 13 matrices, in place of four real products at every frequency, of which images of 16 × 16 have 130. The
gradient goes back the same way: ∂v_t gains Σ_s v_s·(∂R_(t−s) + ∂R_(s−t)ᵀ) instead of V(∂N + ∂Nᴴ) at every frequency.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from espalier.nn.orthogonal.spectrum.batched import takes_batches
from espalier.nn.orthogonal.spectrum.dft import Angles, Lags
from espalier.nn.orthogonal.spectrum.factor import Factor, each, factor_, inverse, solve
from espalier.nn.orthogonal.spectrum.split_complex import SplitComplex, contiguous, product, transpose
from espalier.nn.precision import differentiable, is_tracing, no_autocast


def apply_cayley(x: SplitComplex | None, taps: Tensor, angles: Angles | None, *, wide: bool) -> SplitComplex:
    """Return rows ``x·Qᵀ`` for the orthogonal operators Q of ``taps``, or Qᵀ itself, differentiable any times.

    Args:
        x: split-complex (F·G, B, inputs), the second None for real matrices; None for the identity, if not ``wide``.
        taps: scaled kernel (T, G, rows, n) with rows ≥ n, already transposed if the operator is wide.
        angles: of every tap; the matrices of the G groups of one frequency follow each other. None for real matrices,
            one tap at angle zero.
        wide: whether the operator has fewer outputs than inputs.

    Returns:
        SplitComplex (F·G, B, outputs), without the second for real matrices.
    """
    with no_autocast(taps.device):
        if is_tracing():
            return _forward(x, taps, angles, wide=wide).y
        real, imag = (None, None) if x is None else x
        y: tuple[Tensor, Tensor | None, Tensor, Tensor | None] = _ApplyCayley.apply(real, imag, taps, angles, wide)
        return y[:2]


class _Solution(NamedTuple):
    """What the forward pass computes."""

    y: SplitComplex
    z: SplitComplex
    factor: Factor
    v: SplitComplex | None


def _forward(x: SplitComplex | None, taps: Tensor, angles: Angles | None, *, wide: bool) -> _Solution:
    n_planes, v = _system(taps, angles)
    n = taps.shape[-1]
    if x is None:
        factor = inverse(n_planes)
        z = transpose(factor.planes)
        y: SplitComplex = _plus_identity(2 * z[0], -1), None if z[1] is None else 2 * z[1]
        if v is not None:
            y = each(lambda *parts: torch.cat(parts, -1), y, product(z, transpose(v), alpha=-2))
        return _Solution(y, z, factor, v)
    factor = factor_(n_planes)
    if wide:
        assert v is not None  # a wide operator has more inputs than outputs
        head, tail = _split(x, n)
        z, out = solve(product(tail, v, into=contiguous(head), alpha=-1), factor, head)
    else:
        z, out = solve(x, factor, x, v, transposed=True)
    assert out is not None  # something is taken off twice z
    return _Solution(out, z, factor, v)


def _system(taps: Tensor, angles: Angles | None) -> tuple[SplitComplex, SplitComplex | None]:
    """Return the real and imaginary parts of N (F·G, n, n) and, unless square, of V (F·G, m, n)."""
    rows, n = taps.shape[2:]

    def emit(table: Tensor | None, matrices: Tensor) -> Tensor:
        flat = matrices[0] if table is None else table @ matrices.reshape(len(matrices), -1)
        return flat.view(-1, matrices.shape[2], n)

    cos, sin, lags = angles or (None, None, None)
    top, low = taps[:, :, :n], taps[:, :, n:]
    # U − Uᴴ is linear in the taps: antisymmetric real part, symmetric imaginary part, one product each.
    skew, symmetric = top - top.mT, top + top.mT
    if rows == n:
        real, imag = emit(cos, skew), None if sin is None else emit(sin, symmetric)
        return (_plus_identity(real, 1), imag), None
    v: SplitComplex = emit(cos, low), None if sin is None else emit(sin, low)
    if lags is not None:
        # VᴴV is linear in the products of pairs of taps; see Note [Pairs of taps].
        plain = _pairs(low, lags)
        even, odd = torch.cat((plain[:1], plain[1:] + plain[1:].mT)), plain - plain.mT
        real = emit(_with_lags(cos, lags.cos), torch.cat((skew, even)))
        imag = emit(_with_lags(sin, lags.sin), torch.cat((symmetric, odd)))
        return (_plus_identity(real, 1), imag), v
    n_planes = _plus_identity(emit(cos, skew), 1), None if sin is None else emit(sin, symmetric)
    return product(transpose(v), v, conj_a=True, into=n_planes), v


def _pairs(low: Tensor, lags: Lags) -> Tensor:
    """Return R_d = Σ v_sᵀv_t over the pairs of taps with lag d, (L, G, n, n), from taps (T, G, m, n)."""
    count, groups, _, n = low.shape
    beside = _beside(low)
    blocks = (beside.mT @ beside).view(groups, count, n, count, n).permute(1, 3, 0, 2, 4).flatten(0, 1)
    return low.new_zeros(lags.cos.shape[1], groups, n, n).index_add(0, lags.lag, blocks.index_select(0, lags.pairs))


def _beside(taps: Tensor) -> Tensor:
    """Return taps (T, G, m, n) side by side, (G, m, T·n)."""
    return taps.permute(1, 2, 0, 3).flatten(2)


def _plus_identity(plane: Tensor, times: int) -> Tensor:
    """Return ``plane + times·I``, in place where nothing follows the operations."""
    if differentiable(plane):
        return plane + times * torch.eye(plane.shape[-1], dtype=plane.dtype, device=plane.device)
    plane.diagonal(dim1=1, dim2=2).add_(times)
    return plane


def _split(a: SplitComplex, n: int) -> tuple[SplitComplex, SplitComplex]:
    """Return views of the first n columns and of the others."""
    return each(lambda plane: plane[:, :, :n], a), each(lambda plane: plane[:, :, n:], a)


class _ApplyCayley(torch.autograd.Function):
    """``apply_cayley`` with a backward pass by hand; see Note [Twice differentiable]."""

    @staticmethod
    def forward(
        ctx: Any, real: Tensor | None, imag: Tensor | None, taps: Tensor, angles: Angles | None, wide: bool
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Return the real and imaginary parts of y and of z; the formulas stand at the top of the file."""
        y, z, factor, v = _forward(None if real is None else (real, imag), taps, angles, wide=wide)
        ctx.wide, ctx.angles, ctx.width = wide, angles, factor.width
        ctx.set_materialize_grads(False)
        inputs = (real, imag) if wide else (None, None)
        ctx.save_for_backward(*z, *factor.planes, *(v or (None, None)), taps, *inputs)
        return *y, *z

    @staticmethod
    @takes_batches
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of the images and of the taps."""
        # Unpacked once: checkpointing computes each tensor again and hands it out a single time.
        z_r, z_i, factor_r, factor_i, v_r, v_i, taps, real, imag = ctx.saved_tensors
        z, factor = (z_r, z_i), Factor((factor_r, factor_i), ctx.width)
        v = None if v_r is None else (v_r, v_i)
        with no_autocast(taps.device):
            if is_tracing() or torch.is_grad_enabled():
                n_planes, v = _system(taps, ctx.angles)
                factor = inverse(n_planes)
            outputs = z_r.shape[-1] if ctx.wide else taps.shape[2]
            grad = _filled(grads[:2], z, outputs)
            grad_z = None if grads[2] is None and grads[3] is None else _filled(grads[2:], z, z_r.shape[-1])
            tail = _split((real, imag), z_r.shape[-1])[1] if ctx.wide else None
            needs = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
            if tail is None or v is None:
                grad_x, grad_n, grad_v = _backward_tall(grad, grad_z, z, factor, v, *needs)
            else:
                grad_x, grad_n, grad_v = _backward_wide(grad, grad_z, z, factor, v, tail, *needs)
            grad_taps = None if grad_n is None else _to_taps(grad_n, grad_v, v, ctx.angles, taps)
        return *(grad_x or (None, None)), grad_taps, None, None


def _filled(grad: tuple[Tensor | None, ...], z: SplitComplex, columns: int) -> SplitComplex:
    """Return parts in which gradients that nobody gave are zeros."""
    real, imag = (
        like.new_zeros(*like.shape[:2], columns) if given is None and like is not None else given
        for given, like in zip(grad, z, strict=True)
    )
    assert real is not None
    return real, imag


_Gradients = tuple[SplitComplex | None, SplitComplex | None, SplitComplex | None]


def _backward_tall(
    grad: SplitComplex,
    grad_z: SplitComplex | None,
    z: SplitComplex,
    factor: Factor,
    v: SplitComplex | None,
    x: bool,
    taps: bool,
) -> _Gradients:
    """Nᴴu = g₁ − Vᴴg₂ + ∂z/2, ∂x = 2u − g₁, ∂N = −2uzᴴ, ∂V = −2g₂zᴴ."""
    head, low, right = grad, None, grad
    if v is not None:
        head, low = _split(grad, z[0].shape[-1])
        right = product(low, v, conj_b=True, into=contiguous(head), alpha=-1)
    u, grad_x = solve(_with_half(right, grad_z), factor, head if x else None, conj=True)
    if not taps:
        return grad_x, None, None
    # Rows are batches, so −2uzᴴ is −2(rows of u)ᵀ·conj(rows of z).
    grad_v = None if low is None else product(transpose(low), z, conj_b=True, alpha=-2)
    return grad_x, product(transpose(u), z, conj_b=True, alpha=-2), grad_v


def _backward_wide(
    grad: SplitComplex,
    grad_z: SplitComplex | None,
    z: SplitComplex,
    factor: Factor,
    v: SplitComplex,
    tail: SplitComplex,
    x: bool,
    taps: bool,
) -> _Gradients:
    """conj(N)s = g + ∂z/2, ∂x₁ = 2s − g, ∂x₂ = −2conj(V)s, ∂N = −2conj(z)sᵀ, ∂V = −2conj(x₂)sᵀ."""
    s, grad_x = solve(_with_half(grad, grad_z), factor, grad if x else None, v, transposed=True, conj=True)
    if not taps:
        return grad_x, None, None
    grad_n = product(transpose(z), s, conj_a=True, alpha=-2)
    return grad_x, grad_n, product(transpose(tail), s, conj_a=True, alpha=-2)


def _with_half(right: SplitComplex, grad_z: SplitComplex | None) -> SplitComplex:
    return right if grad_z is None else each(lambda plane, more: plane + more / 2, right, grad_z)


def _to_taps(
    grad_n: SplitComplex, grad_v: SplitComplex | None, v: SplitComplex | None, angles: Angles | None, taps: Tensor
) -> Tensor:
    """Carry ∂N and ∂V back to the taps: ∂V gains V(∂N + ∂Nᴴ); ∂w_t = Σ_f of the tap's cosine and sine parts."""
    groups, n = taps.shape[1], taps.shape[-1]

    def gather(table: Tensor | None, plane: Tensor) -> Tensor:
        if table is not None:
            plane = table.mT @ plane.reshape(table.shape[0], -1)
        return plane.view(len(taps) if table is None else table.shape[1], groups, -1, n)

    cos, sin, lags = angles or (None, None, None)
    real, imag = grad_n
    even = gather(_with_lags(cos, lags and lags.cos), real)
    top = even[: len(taps)] - even[: len(taps)].mT
    if imag is not None:
        odd = gather(_with_lags(sin, lags and lags.sin), imag)
        top = top.add_(odd[: len(taps)]).add_(odd[: len(taps)].mT)
    if grad_v is None or v is None:
        return top
    if lags is None:
        hermitian = real + real.mT, None if imag is None else imag - imag.mT
        grad_v = product(v, hermitian, into=grad_v)
    low = gather(cos, grad_v[0])
    low = low if grad_v[1] is None else low.add_(gather(sin, grad_v[1]))
    if lags is not None:
        low = low.add_(_to_pairs(taps[:, :, n:], even[len(taps) :], odd[len(taps) :], lags))
    return torch.cat((top, low), dim=2)


def _with_lags(of_taps: Tensor | None, of_lags: Tensor | None) -> Tensor | None:
    return of_taps if of_taps is None or of_lags is None else torch.cat((of_taps, of_lags), 1)


def _to_pairs(low: Tensor, even: Tensor, odd: Tensor, lags: Lags) -> Tensor:
    """Return the gradient of V's taps through ``_pairs``, from Σ_f of cosine and sine parts of ∂N at every lag."""
    count, groups, _, n = low.shape
    grad = even + odd - odd.mT + torch.cat((torch.zeros_like(even[:1]), even[1:].mT))
    blocks = low.new_zeros(count * count, groups, n, n).index_copy(0, lags.pairs, grad.index_select(0, lags.lag))
    square = blocks.view(count, count, groups, n, n).permute(2, 0, 3, 1, 4).reshape(groups, count * n, count * n)
    return (_beside(low) @ (square + square.mT)).view(groups, -1, count, n).permute(2, 0, 1, 3)
