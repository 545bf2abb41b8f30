"""The Mamba-2 recurrence (state-space duality): chunks of attention-like matrix products, one state between chunks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from espalier.errors import EspalierError
from espalier.nn.kernels import formulas
from espalier.nn.kernels.backend import choose
from espalier.nn.precision import is_tracing, is_transformed, outside_graphs, upcast, widened, without_autocast
from espalier.nn.ssm.optional_inputs import at_real_tokens, check_devices, check_shapes
from espalier.nn.ssm.ssd_exported import ssd_of_any_length
from espalier.sizes import whole_number

# Note [Segments]
# Within a chunk of Q tokens the recurrence is a Q×Q matrix per head; between chunks only the state travels. Doing all
# chunks at once needs B·H·L·Q numbers several times over, which leave the cache and the memory bar; doing one chunk at
# a time makes many small calls. So several chunks, a segment, are done at once, as many as keep the Q×Q matrices near
# the cache size. The backward pass of a short batch reuses what the forward pass made of a segment; that of a long one,
# where it would have left the cache and filled the memory, recomputes it from the state at the segment's start.
# A GPU's segments are as large as make a product worth its launch: 64 MiB a Q×Q tensor. Between the chunks of a segment
# the state goes by one Triton kernel there, so that launches do not grow with the number of chunks.
_SEGMENT_NUMBERS = {"cpu": 1 << 18, "cuda": 1 << 24}
_KEPT_NUMBERS = 1 << 23

# Note [Gradient of the decays]
# The log-decay of token t weakens all that goes past it: from earlier tokens of its chunk, or the state before, to it
# and later ones, or to the state after. Its gradient is the sum of these, each times its own gradient, summed term by
# term. (Row sums ⟨∂y_i, y_i⟩ less column sums ⟨x̄_i, ∂x̄_i⟩, x̄ = Δx, would give the same without a Q×Q product; but
# they hold what a token gives to itself, which no decay weakens: where one Δ is large, its rounding is all that is
# left.) For the same reason decays are made of wide sums: after one strong decay, differences of others are rounding.


def ssd(
    x_BLHP: Tensor,
    delta_BLH: Tensor,
    a_H: Tensor,
    b_BLGN: Tensor,
    c_BLGN: Tensor,
    d_H: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
    return_state: bool = False,
    chunk_size: int = 64,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the Mamba-2 recurrence ``S_t = exp(Δ_t a) S_{t−1} + Δ_t B_t x_tᵀ``, ``y_t = S_tᵀ C_t + D x_t`` per head.

    States and decays are float32 (float64 for float64 input) whatever autocast says. Heads of a group share B and C.
    Infinities and NaN at a token may reach earlier ones of its chunk, as in causal attention.

    Args:
        x_BLHP: values, (batch, length, heads, width of a head).
        delta_BLH: step sizes Δ ≥ 0.
        a_H: decay rates a ≤ 0.
        b_BLGN: input maps, G groups, state size N.
        c_BLGN: output maps.
        d_H: skip weights.
        initial_state: state before the first token, (B, H, N, P); zero if none is given.
        mask: (B, L), true at real tokens; others leave the state as it is and give 0.
        return_state: also return the state after the last token.
        chunk_size: tokens per chunk; changes speed, not results.

    Returns:
        y of the shape and dtype of ``x_BLHP``, and with ``return_state`` the state (B, H, N, P).

    Raises:
        EspalierError: an empty x, shapes that do not fit together, or a chunk size that is no whole number from 1.

    Source: arXiv 2405.21060, sections 6 and 7.
    """
    _check(x_BLHP, delta_BLH, a_H, b_BLGN, c_BLGN, "B, L")
    chunk_size = whole_number("chunk_size", chunk_size)
    (batch, length, heads, width), dtype = x_BLHP.shape, x_BLHP.dtype
    states = (batch, heads, b_BLGN.shape[3], width)
    check_shapes(d=(d_H, (heads,)), initial_state=(initial_state, states), mask=(mask, (batch, length)))
    x, delta, a, b, c, *rest = upcast(x_BLHP, delta_BLH, a_H, b_BLGN, c_BLGN, d_H, initial_state)
    check_devices(x, delta, a, b, c, *rest)
    if mask is not None:
        x, delta, b, c = at_real_tokens(mask, x, delta, b, c)
    tensors: tuple[Any, ...] = (x, delta, a, b, c, *rest)
    if is_transformed():
        y, final = formulas.grouped_ssd(*tensors)
    elif (name := choose("ssd", x.device.type)) == "compiled":
        y, final = _compiled(tensors, chunk_size, return_state)
    elif name == "mamba_ssm" and x.dtype == torch.float32:
        from espalier.nn.kernels.cuda import ssd_mamba_ssm

        y, final = ssd_mamba_ssm(*tensors, chunk_size=chunk_size)
    else:
        y, final = _grouped(tensors, chunk_size, return_state, name)
    y = (y if mask is None else at_real_tokens(mask, y)[0]).to(dtype)
    return (y, final) if return_state else y


def ssd_step(
    x_BHP: Tensor, delta_BH: Tensor, a_H: Tensor, b_BGN: Tensor, c_BGN: Tensor, d_H: Tensor | None, state_BHNP: Tensor
) -> tuple[Tensor, Tensor]:
    """Advance the Mamba-2 recurrence of ``ssd`` by one token and return (y_BHP, the new state).

    Raises:
        EspalierError: shapes or devices that do not fit together: a state of one sequence would be broadcast.
    """
    _check(x_BHP, delta_BH, a_H, b_BGN, c_BGN, "B")
    (batch, heads, width), size = x_BHP.shape, b_BGN.shape[2]
    check_shapes(d=(d_H, (heads,)), state=(state_BHNP, (batch, heads, size, width)))
    x, delta, a, b, c, d, before = upcast(x_BHP, delta_BH, a_H, b_BGN, c_BGN, d_H, state_BHNP)
    check_devices(x, delta, a, b, c, d, before)
    repeats = x.shape[1] // b.shape[1]
    b_BHN, c_BHN = b.repeat_interleave(repeats, 1), c.repeat_interleave(repeats, 1)
    decay_BH = torch.exp(delta * a)
    state = decay_BH[..., None, None] * before + (delta[..., None] * b_BHN)[..., None] * x[..., None, :]
    y = (c_BHN[..., None] * state).sum(2)
    if d is not None:
        y = y + d[:, None] * x
    return y.to(x_BHP.dtype), state


def _check(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, axes: str) -> None:
    """Refuse shapes that do not fit together; ``axes`` are those of sequences, "B, L", or of one token each, "B"."""
    ndim = len(axes.split()) + 2
    if x.ndim != ndim or delta.shape != x.shape[:-1] or a.shape != x.shape[-2:-1]:
        shapes = f"x is {tuple(x.shape)}, delta {tuple(delta.shape)}, a {tuple(a.shape)}"
        raise EspalierError(f"{shapes}: give ({axes}, H, P), ({axes}, H), (H,)")
    if b.ndim != ndim or b.shape != c.shape or b.shape[:-2] != x.shape[:-2]:
        raise EspalierError(f"b is {tuple(b.shape)} and c {tuple(c.shape)}: give both as ({axes}, G, N)")
    heads, groups = x.shape[-2], b.shape[-2]
    if not groups or heads % groups:
        raise EspalierError(f"{heads} heads do not share {groups} groups evenly: make heads a multiple of it")
    if axes == "B, L" and not x.numel():  # no kernel takes it; a step of no sequences is one
        raise EspalierError(f"x is empty, {tuple(x.shape)}: give at least one sequence of at least one token")


def _compiled(tensors: tuple[Any, ...], chunk_size: int, need_state: bool) -> tuple[Tensor, Tensor]:
    """Run the C++ kernel, which takes heads and groups flat."""
    from espalier.nn.kernels.cpu import needs_grad
    from espalier.nn.kernels.ssd import ssd_cpu

    x, delta, a, b, c, d, state = tensors
    groups = b.shape[2]
    flat = (x.flatten(2), delta, a, b.flatten(2), c.flatten(2), d, state)
    y, final, _ = ssd_cpu(*flat, groups, chunk_size, need_state, needs_grad(*tensors))
    return y.view(x.shape), final


def _grouped(tensors: tuple[Any, ...], chunk_size: int, need_state: bool, name: str) -> tuple[Tensor, Tensor]:
    """Fold groups into the batch, so that the core sees one B and one C for all its heads."""
    x, delta, a, b, c, d, state = tensors
    (batch, length, heads, width), (groups, size) = x.shape, b.shape[2:]

    def fold(tensor_BLG: Tensor) -> Tensor:
        return tensor_BLG.transpose(1, 2).flatten(0, 1)

    # What decays by more is 0, too, and would only cost its chunk digits.
    alpha = (delta * a).clamp_min(math.log(torch.finfo(x.dtype).tiny * torch.finfo(x.dtype).eps) - 1)
    x, delta, alpha = (fold(t.unflatten(2, (groups, -1))) for t in (x, delta, alpha))
    d = None if d is None else d.reshape(groups, -1).repeat(batch, 1)
    state = None if state is None else state.reshape(batch * groups, -1, size, width).transpose(1, 2).contiguous()
    folded = (x, delta, alpha, fold(b), fold(c), d, state)
    if name == "formula":
        y, final = ssd_of_any_length(*folded, chunk_size)
    else:
        y, final = _apply_chunked(*folded, min(chunk_size, length), need_state, name == "triton")
    y = y.unflatten(0, (batch, groups)).transpose(1, 2).reshape(batch, length, heads, width)
    return y, final.transpose(1, 2).reshape(batch, heads, size, width)


def _segments(shape: tuple[int, ...], chunk: int, device: str) -> Iterator[tuple[int, int, int]]:
    """Yield (start, number of chunks, chunk size): full segments, then the ragged last chunk on its own."""
    batch, length, heads, _ = shape
    whole = length // chunk
    numbers = _SEGMENT_NUMBERS.get(device, _SEGMENT_NUMBERS["cpu"])
    together = max(1, numbers // (batch * heads * chunk * chunk))
    for first in range(0, whole, together):
        yield first * chunk, min(together, whole - first), chunk
    if length % chunk:
        yield whole * chunk, 1, length % chunk


class _Segment(NamedTuple):
    """What both passes need of one segment: n chunks of Q tokens."""

    x_BnQHP: Tensor
    delta_BnQH: Tensor
    b_mQN: Tensor  # m = B·n
    c_mQN: Tensor
    start_BnQH: Tensor  # decay from the chunk's start to each token
    end_BnQH: Tensor  # decay from each token to the chunk's end
    decay_BnHQQ: Tensor
    scores_BnQQ: Tensor
    into_BnQHP: Tensor | None  # Δx decayed to the chunk's end; None where nobody asks for the state after
    states_BnNHP: Tensor | None  # state before each chunk; None when it is zero
    after_BNHP: Tensor | None


_MADE = len(_Segment._fields) - 4


def _inputs(tensors: tuple[Tensor, ...], place: tuple[int, int, int]) -> tuple[Tensor, ...]:
    """Return one segment's share of (x, delta, alpha, b, c), by chunks."""
    start, n, q = place
    x, delta, alpha, b, c = (t[:, start : start + n * q].unflatten(1, (n, q)) for t in tensors)
    return x, delta, alpha, b.flatten(0, 1), c.flatten(0, 1)


def _between_chunks(
    updates_BnNHP: Tensor, decays_BnH: Tensor, first_BNHP: Tensor | None, in_triton: bool, *, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the state before each chunk and the one after all: state ← update + decay · state.

    ``reverse`` goes from the last chunk to the first.
    """
    if in_triton:
        from espalier.nn.kernels.triton_scans import walk_chunks

        return walk_chunks(updates_BnNHP, decays_BnH, first_BNHP, reverse=reverse)
    before, state = torch.empty_like(updates_BnNHP), first_BNHP
    chunks = range(updates_BnNHP.shape[1])
    for k in reversed(chunks) if reverse else chunks:
        before[:, k] = 0 if state is None else state
        update = updates_BnNHP[:, k]
        state = update if state is None else torch.addcmul(update, decays_BnH[:, k, None, :, None], state)
    assert state is not None  # there is a chunk
    return before, state


def _prepare(
    tensors: tuple[Tensor, ...], place: tuple[int, int, int], state: Tensor | None, state_needed: bool, in_triton: bool
) -> _Segment:
    """Compute decays, scores and the states before each chunk of one segment."""
    x, delta, alpha, b, c = _inputs(tensors, place)
    batch, n, q, heads, width = x.shape
    start, end, decay = _decays(alpha)
    scores = torch.bmm(c, b.mT).tril_().view(batch, n, q, q)
    if not state_needed and state is None and n == 1:
        return _Segment(x, delta, b, c, start, end, decay, scores, None, None, None)
    into = x * (delta * end)[..., None]
    updates = torch.bmm(b.mT, into.reshape(batch * n, q, heads * width)).view(batch, n, -1, heads, width)
    if state is None and n == 1:
        return _Segment(x, delta, b, c, start, end, decay, scores, into, None, updates[:, 0])
    states, after = _between_chunks(updates, start[:, :, -1], state, in_triton)
    return _Segment(x, delta, b, c, start, end, decay, scores, into, states, after)


def _decays(alpha_BnQH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the decays from a chunk's start to each token, from each to its end, and (B, n, H, Q, Q) between two."""
    dtype = alpha_BnQH.dtype
    cum = widened(alpha_BnQH).cumsum(2)
    cum_BnHQ = cum.transpose(2, 3).contiguous()
    # Above the diagonal the exponent would be positive and could overflow: cut it at 0, the scores are 0 there.
    between = (cum_BnHQ[..., :, None] - cum_BnHQ[..., None, :]).clamp_max_(0).to(dtype).exp_()
    return cum.to(dtype).exp(), (cum[:, :, -1:] - cum).to(dtype).exp_(), between


def _heads_first(tensor_BnQHP: Tensor) -> Tensor:
    """Return (B·n·H, Q, P), contiguous, for the products with a Q×Q matrix per head."""
    return tensor_BnQHP.transpose(2, 3).reshape(-1, tensor_BnQHP.shape[2], tensor_BnQHP.shape[4])


class _Chunked(torch.autograd.Function):
    """The recurrence for one group, with a backward pass by hand.

    Tensors are x (B, L, H, P), delta and alpha (B, L, H), b and c (B, L, N), d (B, H) and the first state (B, N, H, P).
    """

    @staticmethod
    @without_autocast
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor]:
        x, inputs, (d, state, chunk, need_state, in_triton) = given[0], given[:5], given[5:]
        batch, length, heads, width = x.shape
        ctx.in_triton = in_triton and not is_tracing()  # what traces sees through the operations of torch alone
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        states: list[Tensor | None] = []
        kept: list[Any] = []
        places = list(_segments(x.shape, chunk, x.device.type))
        keep = batch * length * heads * chunk <= _KEPT_NUMBERS and any(ctx.needs_input_grad)
        for place in places:
            states.append(state)
            seg = _prepare(inputs, place, state, need_state or place is not places[-1], ctx.in_triton)
            state = seg.after_BNHP
            kept += seg[-_MADE:] if keep else ()
            _write_outputs(y[:, place[0] : place[0] + place[1] * place[2]], seg, d)
        final = state if need_state else x.new_zeros(batch, inputs[-1].shape[-1], heads, width)
        ctx.save_for_backward(*inputs, d, *states, *kept)
        ctx.places, ctx.need_state = places, need_state
        if not need_state:
            ctx.mark_non_differentiable(final)
        return y, final

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dy, dfinal = gradients
        saved = ctx.saved_tensors  # once: checkpointing hands each tensor out a single time
        inputs, (d, *rest) = saved[:5], saved[5:]
        states, kept = rest[: len(ctx.places)], rest[len(ctx.places) :]
        dstate = dfinal if ctx.need_state else None
        if formulas.by_formula():
            found = formulas.differentiate(formulas.ssd_of_one_group, (*inputs, d, states[0]), (dy, dstate))
            return (*found, None, None, None)
        grads = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs)
        dd = None if d is None else torch.zeros_like(d)
        for place, state in zip(reversed(ctx.places), reversed(states), strict=True):
            if kept:
                made, kept = kept[-_MADE:], kept[:-_MADE]
                x, delta, _, b, c = _inputs(inputs, place)
                seg = _Segment(x, delta, b, c, *made)
            else:
                seg = _prepare(inputs, place, state, dstate is not None, ctx.in_triton)
            span = slice(place[0], place[0] + place[1] * place[2])
            results, dstate, skip = _segment_backward(
                seg, dy[:, span].unflatten(1, place[1:]), d, dstate, ctx.in_triton
            )
            for grad, result in zip(grads, results, strict=True):
                grad[:, span] = result.flatten(1, 2)
            if dd is not None:
                dd += skip
        return (*grads, dd, dstate if ctx.needs_input_grad[6] else None, None, None, None)


def _write_outputs(y_BTHP: Tensor, seg: _Segment, d_BH: Tensor | None) -> None:
    """Write y = (decayed scores) Δx + decay · C S + D x into one segment of the output."""
    batch, n, q, heads, width = seg.x_BnQHP.shape
    values = _heads_first(seg.x_BnQHP * seg.delta_BnQH[..., None])
    mixing = (seg.decay_BnHQQ * seg.scores_BnQQ[:, :, None]).view(-1, q, q)
    y = torch.bmm(mixing, values).view(batch, n, heads, q, width).transpose(2, 3)
    if seg.states_BnNHP is not None:
        past = torch.bmm(seg.c_mQN, seg.states_BnNHP.view(batch * n, -1, heads * width)).view(batch, n, q, heads, width)
        y = torch.addcmul(y, past, seg.start_BnQH[..., None])
    if d_BH is not None:
        y = torch.addcmul(y, seg.x_BnQHP, d_BH[:, None, None, :, None])
    y_BTHP.unflatten(1, (n, q)).copy_(y)


def _segment_backward(
    seg: _Segment, dy: Tensor, d_BH: Tensor | None, dafter: Tensor | None, in_triton: bool
) -> tuple[tuple[Tensor, ...], Tensor | None, Tensor]:
    """Return gradients of (x, delta, alpha, b, c), of the state before the segment, and of D per batch entry."""
    x, delta = seg.x_BnQHP, seg.delta_BnQH
    batch, n, q, heads, width = x.shape
    flat = (batch * n, q, heads * width)
    dy_h, values_h = _heads_first(dy), _heads_first(x * delta[..., None])
    # The part inside chunks.
    dmixing = torch.bmm(dy_h, values_h.mT).view(batch, n, heads, q, q).mul_(seg.decay_BnHQQ)
    dscores = dmixing.sum(2).tril_().view(-1, q, q)
    dalpha = _crossing(dmixing, seg.scores_BnQQ)
    mixing = (seg.decay_BnHQQ * seg.scores_BnQQ[:, :, None]).view(-1, q, q)
    dvalues = torch.bmm(mixing.mT, dy_h).view(batch, n, heads, q, width).transpose(2, 3)
    dc, db = torch.bmm(dscores, seg.b_mQN), torch.bmm(dscores.mT, seg.c_mQN)
    # The part through the states.
    dbefore = dafter
    if seg.states_BnNHP is not None or dafter is not None:
        from_BnQHP = dy * seg.start_BnQH[..., None]
        through = torch.bmm(seg.c_mQN.mT, from_BnQHP.reshape(flat)).view(batch, n, -1, heads, width)
        dends, dbefore = _between_chunks(through, seg.start_BnQH[:, :, -1], dafter, in_triton, reverse=True)
        if seg.states_BnNHP is not None:
            states = seg.states_BnNHP.view(batch * n, -1, heads * width)
            dc.baddbmm_(from_BnQHP.reshape(flat), states.mT)
            entering = (torch.bmm(seg.c_mQN, states).view(x.shape) * from_BnQHP).sum(-1)
            dalpha += entering.flip(2).cumsum(2).flip(2)
            dalpha += (seg.start_BnQH[:, :, -1] * (seg.states_BnNHP * dends).sum((2, 4)))[:, :, None]
        if seg.into_BnQHP is not None:
            flat_dends = dends.view(batch * n, -1, heads * width)
            db.baddbmm_(seg.into_BnQHP.reshape(flat), flat_dends.mT)
            back = torch.bmm(seg.b_mQN, flat_dends).view(x.shape) * seg.end_BnQH[..., None]
            leaving = (x * back).sum(-1) * delta
            dalpha[:, :, 1:] += leaving[:, :, :-1].cumsum(2)
            dvalues = dvalues + back
    skip, columns = (dy * x).sum(-1), (x * dvalues).sum(-1)
    dx = dvalues * delta[..., None]
    if d_BH is not None:
        dx = torch.addcmul(dx, dy, d_BH[:, None, None, :, None])
    shape = (batch, n, q, -1)
    return (dx, columns, dalpha, db.view(shape), dc.view(shape)), dbefore, skip.sum((1, 2))


def _crossing(dmixing_BnHQQ: Tensor, scores_BnQQ: Tensor) -> Tensor:
    """Return what tokens before t hand to t and later ones of its chunk, times its gradient: (B, n, Q, H)."""
    handed = (dmixing_BnHQQ * scores_BnQQ[:, :, None]).tril_(-1)
    up_to = handed.cumsum_(-1).tril_(-1).sum(-2)  # what tokens up to s hand to later ones
    return F.pad(up_to[..., :-1], (1, 0)).transpose(2, 3).contiguous()


# Wrapped once, here: a compiler that meets the call cannot trace the wrapping.
_apply_chunked = outside_graphs(_Chunked.apply)
