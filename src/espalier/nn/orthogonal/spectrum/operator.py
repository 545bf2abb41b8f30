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

from espalier.nn.orthogonal.spectrum.dft import Angles, Lags
from espalier.nn.orthogonal.spectrum.factor import Factor, factor_, inverse, solve
from espalier.nn.orthogonal.spectrum.split_complex import SplitComplex, beside, contiguous, each, product, transpose
from espalier.nn.precision import differentiable, is_tracing, no_autocast, takes_batches


def apply_cayley(x: SplitComplex, taps: Tensor, angles: Angles | None, *, wide: bool) -> SplitComplex:
    """Return rows ``x·Qᵀ`` for the orthogonal operators Q of ``taps``, or Qᵀ itself, differentiable any times.

    Args:
        x: split-complex (F·G, B, inputs), one plane for real matrices; () for the identity, if not ``wide``.
        taps: scaled kernel (T, G, rows, n) with rows ≥ n, already transposed if the operator is wide.
        angles: of every tap; the matrices of the G groups of one frequency follow each other. None for real matrices,
            one tap at angle zero.
        wide: whether the operator has fewer outputs than inputs.

    Returns:
        Split-complex (F·G, B, outputs), one plane for real matrices.
    """
    with no_autocast(taps.device):
        if is_tracing():
            return _forward(x, taps, angles, wide=wide)[0]
        planes: SplitComplex = _ApplyCayley.apply(taps, angles, wide, *x)
        return planes[: len(planes) // 2]


class _Solution(NamedTuple):
    """What the forward pass finds: z, what was made of N, and V, () of square matrices."""

    z: SplitComplex
    factor: Factor
    v: SplitComplex


def _forward(x: SplitComplex, taps: Tensor, angles: Angles | None, *, wide: bool) -> tuple[SplitComplex, _Solution]:
    """Return (y, the solution)."""
    n_planes, v = _system(taps, angles)
    if not x:
        factor = inverse(n_planes)
        z = transpose(factor.planes)
        y = _plus_identity(each(lambda plane: 2 * plane, z), -1)
        return (beside(y, product(z, transpose(v), alpha=-2)) if v else y), _Solution(z, factor, v)
    factor = factor_(n_planes)
    if wide:
        head, tail = _split(x, taps.shape[-1])
        z, y = solve(product(tail, v, into=contiguous(head), alpha=-1), factor, head)
    else:
        z, y = solve(x, factor, x, v, transposed=True)
    return y, _Solution(z, factor, v)


def _system(taps: Tensor, angles: Angles | None) -> tuple[SplitComplex, SplitComplex]:
    """Return the real and imaginary parts of N (F·G, n, n) and of V (F·G, m, n), () if square."""
    rows, n = taps.shape[2:]

    def emit(tables: _TablesOfTaps, *matrices: Tensor) -> SplitComplex:
        return tuple(
            (given[0] if table is None else table @ given.reshape(len(given), -1)).view(-1, given.shape[2], n)
            for table, given in zip(tables, matrices, strict=False)  # real matrices have one table
        )

    tables, lags = _tables(angles, lags=False), angles and angles.lags
    top, low = taps[:, :, :n], taps[:, :, n:]
    # U − Uᴴ is linear in the taps: antisymmetric real part, symmetric imaginary part, one product each.
    skew, symmetric = top - top.mT, top + top.mT
    v = () if rows == n else emit(tables, low, low)
    if v and lags is not None:
        # VᴴV is linear in the products of pairs of taps; see Note [Pairs of taps].
        plain = _pairs(low, lags)
        even, odd = torch.cat((plain[:1], plain[1:] + plain[1:].mT)), plain - plain.mT
        tables, skew, symmetric = _tables(angles, lags=True), torch.cat((skew, even)), torch.cat((symmetric, odd))
    system = _plus_identity(emit(tables, skew, symmetric), 1)
    if v and lags is None:
        system = product(transpose(v), v, conj_a=True, into=system)
    return system, v


_TablesOfTaps = tuple[Tensor | None, ...]


def _tables(angles: Angles | None, *, lags: bool) -> _TablesOfTaps:
    """Return the cosines and sines of the taps, and of the lags behind them if asked; none of one real matrix."""
    if angles is None:
        return (None,)
    if lags and angles.lags is not None:
        return torch.cat((angles.cos, angles.lags.cos), 1), torch.cat((angles.sin, angles.lags.sin), 1)
    return angles.cos, angles.sin


def _pairs(low: Tensor, lags: Lags) -> Tensor:
    """Return R_d = Σ v_sᵀv_t over the pairs of taps with lag d, (L, G, n, n), from taps (T, G, m, n)."""
    count, groups, _, n = low.shape
    beside = _beside(low)
    blocks = (beside.mT @ beside).view(groups, count, n, count, n).permute(1, 3, 0, 2, 4).flatten(0, 1)
    return low.new_zeros(lags.cos.shape[1], groups, n, n).index_add(0, lags.lag, blocks.index_select(0, lags.pairs))


def _beside(taps: Tensor) -> Tensor:
    """Return taps (T, G, m, n) side by side, (G, m, T·n)."""
    return taps.permute(1, 2, 0, 3).flatten(2)


def _plus_identity(planes: SplitComplex, times: int) -> SplitComplex:
    """Return ``planes + times·I``, in place where nothing follows the operations."""
    real, *imag = planes
    if differentiable(real):
        real = real + times * torch.eye(real.shape[-1], dtype=real.dtype, device=real.device)
    else:
        real.diagonal(dim1=1, dim2=2).add_(times)
    return real, *imag


def _split(a: SplitComplex, n: int) -> tuple[SplitComplex, SplitComplex]:
    """Return views of the first n columns and of the others."""
    return each(lambda plane: plane[:, :, :n], a), each(lambda plane: plane[:, :, n:], a)


class _ApplyCayley(torch.autograd.Function):
    """``apply_cayley`` with a backward pass by hand; see Note [Twice differentiable]."""

    @staticmethod
    def forward(ctx: Any, taps: Tensor, angles: Angles | None, wide: bool, *x: Tensor) -> SplitComplex:
        """Return the real and imaginary parts of y and of z; the formulas stand at the top of the file."""
        y, (z, factor, v) = _forward(x, taps, angles, wide=wide)
        ctx.wide, ctx.angles, ctx.width, ctx.given = wide, angles, factor.width, len(x)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(taps, *z, *factor.planes, *v, *(x if wide else ()))
        return *y, *z

    @staticmethod
    @takes_batches
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of the taps and of the images."""
        # Unpacked once: checkpointing computes each tensor again and hands it out a single time.
        taps, *saved = ctx.saved_tensors
        parts, n = len(grads) // 2, taps.shape[-1]
        z, planes, v, x = (tuple(saved[first : first + parts]) for first in range(0, 4 * parts, parts))
        with no_autocast(taps.device):
            factor = Factor(planes, ctx.width)
            if is_tracing() or torch.is_grad_enabled():
                n_planes, v = _system(taps, ctx.angles)
                factor = inverse(n_planes)
            solution = _Solution(z, factor, v)
            grad = _filled(grads[:parts], z, n if ctx.wide else taps.shape[2])
            grad_z = () if grads[parts:] == (None,) * parts else _filled(grads[parts:], z, n)
            needs = any(ctx.needs_input_grad[3:]), ctx.needs_input_grad[0]
            if ctx.wide:
                grad_x, grad_n, grad_v = _backward_wide(grad, grad_z, solution, _split(x, n)[1], *needs)
            else:
                grad_x, grad_n, grad_v = _backward_tall(grad, grad_z, solution, *needs)
            grad_taps = _to_taps(grad_n, grad_v, v, ctx.angles, taps) if grad_n else None
        return grad_taps, None, None, *(grad_x or (None,) * ctx.given)


def _filled(grad: tuple[Tensor | None, ...], z: SplitComplex, columns: int) -> SplitComplex:
    """Return parts in which gradients that nobody gave are zeros."""
    return tuple(
        like.new_zeros(*like.shape[:2], columns) if given is None else given
        for given, like in zip(grad, z, strict=True)
    )


_Gradients = tuple[SplitComplex, SplitComplex, SplitComplex]
"""Of x, N and V; () for what nobody asks for."""


def _backward_tall(grad: SplitComplex, grad_z: SplitComplex, solution: _Solution, x: bool, taps: bool) -> _Gradients:
    """Nᴴu = g₁ − Vᴴg₂ + ∂z/2, ∂x = 2u − g₁, ∂N = −2uzᴴ, ∂V = −2g₂zᴴ."""
    z, factor, v = solution
    head, right = grad, grad
    low: SplitComplex = ()
    if v:
        head, low = _split(grad, z[0].shape[-1])
        right = product(low, v, conj_b=True, into=contiguous(head), alpha=-1)
    u, grad_x = solve(_with_half(right, grad_z), factor, head if x else (), conj=True)
    if not taps:
        return grad_x, (), ()
    # Rows are batches, so −2uzᴴ is −2(rows of u)ᵀ·conj(rows of z).
    grad_n, grad_v = (product(transpose(of), z, conj_b=True, alpha=-2) if of else () for of in (u, low))
    return grad_x, grad_n, grad_v


def _backward_wide(
    grad: SplitComplex, grad_z: SplitComplex, solution: _Solution, tail: SplitComplex, x: bool, taps: bool
) -> _Gradients:
    """conj(N)s = g + ∂z/2, ∂x₁ = 2s − g, ∂x₂ = −2conj(V)s, ∂N = −2conj(z)sᵀ, ∂V = −2conj(x₂)sᵀ."""
    z, factor, v = solution
    s, grad_x = solve(_with_half(grad, grad_z), factor, grad if x else (), v, transposed=True, conj=True)
    if not taps:
        return grad_x, (), ()
    grad_n, grad_v = (product(transpose(of), s, conj_a=True, alpha=-2) for of in (z, tail))
    return grad_x, grad_n, grad_v


def _with_half(right: SplitComplex, grad_z: SplitComplex) -> SplitComplex:
    return each(lambda plane, more: plane + more / 2, right, grad_z) if grad_z else right


def _to_taps(
    grad_n: SplitComplex, grad_v: SplitComplex, v: SplitComplex, angles: Angles | None, taps: Tensor
) -> Tensor:
    """Carry ∂N and ∂V back to the taps: ∂V gains V(∂N + ∂Nᴴ); ∂w_t = Σ_f of the tap's cosine and sine parts."""
    count, groups, _, n = taps.shape

    def gather(tables: _TablesOfTaps, planes: SplitComplex) -> SplitComplex:
        return tuple(
            (plane if table is None else table.mT @ plane.reshape(len(table), -1)).view(
                count if table is None else table.shape[1], groups, -1, n
            )
            for table, plane in zip(tables, planes, strict=True)
        )

    lags = angles and angles.lags
    even, *odd = gather(_tables(angles, lags=True), grad_n)
    top = even[:count] - even[:count].mT
    for part in odd:
        top = top.add_(part[:count]).add_(part[:count].mT)
    if not v:
        return top
    if lags is None:
        real, *imag = grad_n
        hermitian = real + real.mT, *(plane - plane.mT for plane in imag)
        grad_v = product(v, hermitian, into=grad_v)
    low, *more = gather(_tables(angles, lags=False), grad_v)
    for part in more:
        low = low.add_(part)
    if lags is not None:
        low = low.add_(_to_pairs(taps[:, :, n:], even[count:], odd[0][count:], lags))
    return torch.cat((top, low), dim=2)


def _to_pairs(low: Tensor, even: Tensor, odd: Tensor, lags: Lags) -> Tensor:
    """Return the gradient of V's taps through ``_pairs``, from Σ_f of cosine and sine parts of ∂N at every lag."""
    count, groups, _, n = low.shape
    grad = even + odd - odd.mT + torch.cat((torch.zeros_like(even[:1]), even[1:].mT))
    blocks = low.new_zeros(count * count, groups, n, n).index_copy(0, lags.pairs, grad.index_select(0, lags.lag))
    square = blocks.view(count, count, groups, n, n).permute(2, 0, 3, 1, 4).reshape(groups, count * n, count * n)
    return (_beside(low) @ (square + square.mT)).view(groups, -1, count, n).permute(2, 0, 1, 3)
