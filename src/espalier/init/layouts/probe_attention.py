"""What a reading of attention weights must survive before it is written: tests on the module's own scores and output.

Note [What proves a layout]
Let a module compute, for head h and tokens i and j, scores S_h(i, j) = f(W_Q,h x_i)ᵀ R(i, j) f(W_K,g x_j) + b_h(i, j)
and outputs Σ_h W_out,h Σ_j softmax(S_h)(i, j) · W_V,g x_j, with any rotation R that is the identity at i = j, any odd f
that treats the channels of a head alike (none, an RMS norm, a unit norm) and any positional b. Then views of the right
rows, and only those, show the following, which is tested on random weights and tokens in float64:

1. signs ε_h on a head's queries and η_g on a group's keys turn S − b into ε_h η_g (S − b): heads and groups;
2. signs (or a permutation) on the channels of keys and of the queries that meet them leave S(i, i) as it is: channels;
3. a small push of W_Q by a ⊗ v moves S(i, j) in proportion to v·x_i, one of W_K in proportion to v·x_j, with the same
   x_i and x_j: what is a query, what is a key, and that both come from the same tokens;
4. signs (or a permutation) on value rows and the output columns that meet them leave the output as it is, and on either
   alone do not: values and outputs;
5. a push of W_V moves an output through other tokens' values than its own: it is a value and not a gate;
6. with the rows of the keys in the place of the queries', S(i, i) is positive in every head: the sign of the product;
   S(i, i) and the move of an output are the products themselves, of the module's own tokens, up to a positive factor.
   What stands before the projections or after the output (a linear map, a factor, another order) is noted.

Where a score has terms of its query or of its key alone, too (relative positions: q·r, u·k), the same is tested on
S(q, k) − S(q, 0) − S(0, k) + S(0, 0), which is their product; S(i, i) must then be that of the rows exactly. Where
values have such terms (v + r), the output is taken less that with values of zero, and must be theirs exactly, too. A
term of the keys alone follows their own tokens, one of the queries theirs, and one beside the values none: what is left
without the rows and follows others is a product of weights that no row holds (an adapter's).

Scores are what reaches the softmax; fused kernels are told to take the products one by one, so that it is called.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from espalier.init.layouts.compare import (
    PUSH,
    PUSHED,
    is_clear,
    is_close,
    is_near,
    is_open,
    off_multiple,
    same_direction,
)
from espalier.init.layouts.registry import ROTARY, AttentionWeights
from espalier.init.layouts.scratch import Call, CannotRunError
from espalier.init.layouts.trial import Misfit, Seen, Trial, Unproven

# How well a product must be followed to be called one, and factors that are noted.
_FOLLOWED = 0.7
_LIKE = 0.5
# The least share of the largest head's factor that a head's output may have and still be one of its own tokens' values.
_LEAST = 0.2
BESIDE = "something stands before its projections or after its output: its products are not those of its tokens"
TERMS = {
    "scores": "scores have terms of queries or keys alone, too (relative positions)",
    "values": "what is attended to has terms beside its values (relative positions)",
}
_FACTORS = (0.4, 2.5)
_OFF = 1.1
# How far from 1 the cosine of what must be the product itself may be: code may take it in float32.
_EXACT = 1e-6
# Numbers of scores and outputs that are kept to compare other layers with.
_SHARE = 100_000


def prove_attention(module: nn.Module, weights: AttentionWeights, call: Call) -> str:
    """Return a note on how scores and products differ from plain ones, after a proof that views mean what they say.

    Args:
        module: a scratch copy of the layer (``copy_for_probe``), inside ``untraced``.
        weights: views into that copy.
        call: inputs that it runs on.

    Raises:
        Unproven: the module computes something else with these rows.
        CannotRunError: it does not run on these inputs.
    """
    trial = Trial(module, weights, call)
    try:
        return _prove(trial)
    except Misfit:
        raise
    except Unproven:
        if not (found := trial.terms()):
            raise
        _prove_terms(trial)
        trial.alone = found
        return "; ".join(filter(None, [_prove(trial), *(TERMS[name] for name in sorted(found))]))


def _prove(trial: Trial) -> str:
    generator = torch.Generator().manual_seed(2)
    base = trial.look()
    notes = _prove_scores(trial, base, generator)
    _prove_tokens(trial, base, generator)
    if (least_H := trial.squares().amin(1)).min() < 0:
        raise Unproven(f"the scores of head {int(least_H.argmin())} follow its QK product with the other sign")
    notes.append(_prove_values(trial, base, generator))
    return "; ".join(dict.fromkeys(filter(None, notes)))


def _prove_terms(trial: Trial) -> None:
    """See the note: every second token is another, and what does not follow it must stay where its rows are zero."""
    call, moved = trial.call, _every_second_moved(trial.call, trial.q.shape[-1])
    if moved is None:
        raise Unproven("its scores or values have terms of their own, and no tokens to tell of what")
    still = torch.arange(call.length) % 2 == 1
    no_q, no_k, no_v = ({name: torch.zeros_like(getattr(trial, name))} for name in ("q", "k", "v"))
    base = trial.look()

    def steps(**changed: Tensor) -> tuple[Tensor, Tensor]:
        trial.call = moved
        try:
            after = trial.look(**changed)
        finally:
            trial.call = call
        before = trial.look(**changed)
        scores = torch.where(is_open(base.scores_HLL), after.scores_HLL - before.scores_HLL, 0.0)
        return scores + base.scores_HLL, after.out - before.out + base.out

    of_k, of_q = steps(**no_q)[0], steps(**no_k)[0]
    kept = is_close(of_k[:, :, still], *2 * [base.scores_HLL[:, :, still]])
    if not kept or not is_close(of_q[:, still], *2 * [base.scores_HLL[:, still]]):
        raise Unproven("its scores have products of tokens beside that of its rows: of an adapter, or of other weights")
    if not is_near(steps(**no_q, **no_k, **no_v)[1], base.out):
        raise Unproven("what it returns follows its tokens in other ways than through its rows, too")


def behaviour(module: nn.Module, weights: AttentionWeights, call: Call) -> list[Tensor]:
    """Return what a copy makes of these inputs: scores and output, of many numbers a share.

    Copies have the same weights, so that a layer that makes the same computes what the other does: what was proven of
    one that differs in its number alone is proven of it.

    Raises:
        Unproven, CannotRunError: see ``prove_attention``.
    """
    base = Trial(module, weights, call).look()
    parts = (base.scores_HLL.nan_to_num(0.0, 0.0, 0.0).flatten(), base.out.flatten())
    return [part[:: 1 + part.numel() // _SHARE].clone() for part in parts]


def acts_alike(module: nn.Module, weights: AttentionWeights, call: Call, then: list[Tensor]) -> bool:
    """Return whether a copy makes of these inputs what another made (``behaviour``); False where it makes nothing."""
    with suppress(Unproven, CannotRunError):
        now = behaviour(module, weights, call)
        return all(a.shape == b.shape and is_near(a, b) for a, b in zip(now, then, strict=True))
    return False


def meets_own_tokens(module: nn.Module, weights: AttentionWeights, call: Call) -> bool:
    """Return whether a copy's keys come from its queries' own tokens on these inputs: test 3 of the note.

    Raises:
        Misfit, CannotRunError: its scores are not those expected, or it does not run.
    """
    trial = Trial(module, weights, call)
    base = trial.look()
    try:
        _prove_tokens(trial, base, torch.Generator().manual_seed(2))
    except Unproven:
        return False
    return True


def _prove_scores(trial: Trial, base: Seen, generator: torch.Generator) -> list[str]:
    """Tests 1, 2 and 6 of the note; return what was found to stand between the product and the score."""
    if base.scores_HLL.isnan().any():
        raise Misfit("its scores are no numbers on these inputs")
    bias = trial.look(q=0 * trial.q, k=0 * trial.k).scores_HLL
    shown = base.scores_HLL - bias
    if not is_clear(shown[is_open(base.scores_HLL)]):
        raise Unproven("its scores do not depend on these queries and keys")
    for _ in range(3):
        heads, groups = (_signs(generator, count)[:, None, None] for count in (trial.heads, trial.groups))
        turned = trial.look(q=trial.q * heads, k=trial.k * groups).scores_HLL - bias
        if not is_close(turned, heads * trial.to_heads(groups) * shown, base.scores_HLL):
            raise Unproven("a head's scores are not made of the rows that were read as its queries and keys")
    orders = _orders(generator, trial.groups, trial.width)
    changes = [{"q": _taken(trial.q, trial.to_heads(orders)), "k": _taken(trial.k, orders)}]
    for _ in range(2):
        signs = _signs(generator, trial.groups, trial.width)[..., None]
        changes.append({"q": trial.q * trial.to_heads(signs), "k": trial.k * signs})
    paired = [trial.look(**change).scores_HLL for change in changes]
    own = base.scores_HLL.diagonal(0, 1, 2)
    kept = [is_close(scores.diagonal(0, 1, 2), own, own) for scores in paired]
    if not kept[0] and not (kept[1] and kept[2]):
        raise Unproven("channels of its queries and keys do not meet in the order that was read")
    alone = trial.look(q=changes[kept.index(True)]["q"]).scores_HLL
    if trial.width > 1 and is_close(alone, base.scores_HLL, base.scores_HLL):
        raise Unproven("its scores do not depend on the order of channels")
    notes = []
    moved = [scores for scores, same in zip(paired, kept, strict=True) if same]
    if not all(is_close(scores, base.scores_HLL, base.scores_HLL) for scores in moved):
        notes.append(ROTARY)
    doubled = trial.look(q=2 * trial.q).scores_HLL - bias
    if is_close(doubled, shown, base.scores_HLL):
        notes.append("queries and keys are normalised: their product holds up to scale")
    elif not is_close(doubled, 2 * shown, base.scores_HLL):
        notes.append("scores are no linear function of the QK product: it holds up to their scale")
    tokens_LD, exact = _tokens(trial.call, trial.q.shape[-1]), False
    if tokens_LD is not None:
        q_HKL, k_HKL = trial.q @ tokens_LD.mT, trial.to_heads(trial.k @ tokens_LD.mT)
        product_HL = (q_HKL * k_HKL).sum(1) / trial.width**0.5
        found_HL = shown.diagonal(0, 1, 2)
        remark = _followed(found_HL, product_HL, "its scores", "the QK product over √k")
        alike_H = (found_HL * product_HL).sum(1) / (found_HL.norm(dim=1) * product_HL.norm(dim=1))
        remark = BESIDE if bool((alike_H < _LIKE).any()) else remark
        exact = bool((alike_H > 1 - _EXACT).all())
        # What is normalised or bent has no factor; what is turned has.
        holds = all(note == ROTARY for note in notes)
        notes += [remark] if remark and (holds or "times" not in remark) else []
    if "scores" in trial.alone and not exact:
        # What has terms of its own may hold rows of keys among its queries: nothing but the product itself will do.
        raise Unproven("its scores are not the product of its tokens' queries and keys, and terms of either alone")
    return notes


def _prove_tokens(trial: Trial, base: Seen, generator: torch.Generator) -> None:
    """Test 3 of the note: pushes of W_Q and W_K by a ⊗ v, two of each."""
    ways = torch.randn(2, trial.q.shape[-1], generator=generator, dtype=torch.float64)
    moved = []
    for name, part in (("q", trial.q), ("k", trial.k)):
        push = torch.randn(len(part), trial.width, 1, generator=generator, dtype=torch.float64) * PUSH
        pushed = [trial.look(**{name: part + push * way_D}).scores_HLL for way_D in ways]
        moved.append(torch.stack(pushed) - base.scores_HLL)
    by_q, by_k = moved
    own_q, own_k = by_q.diagonal(0, 2, 3), by_k.diagonal(0, 2, 3)
    seen = is_open(base.scores_HLL)
    if not same_direction(by_q, own_q[..., :, None], seen):
        raise Unproven("what was read as queries is not: a score does not follow its row's token through it")
    if not same_direction(by_k, own_k[..., None, :], seen):
        raise Unproven("what was read as keys is not: a score does not follow its column's token through it")
    if not same_direction(own_q, own_k, seen.diagonal(0, 1, 2)):
        raise Unproven("its keys come from other tokens than its queries: cross-attention")


def _prove_values(trial: Trial, base: Seen, generator: torch.Generator) -> str:
    """Tests 4, 5 and 6 of the note; return what was found to stand between the product and the output, if anything."""
    # Several of each: one draw may be the same for two groups, and then it does not tell them apart.
    for kind in ("signs", "orders"):
        changes = []
        for _ in range(3):
            if kind == "signs":
                signs = _signs(generator, trial.groups, trial.values)[..., None]
                changes.append((trial.v * signs, trial.o * trial.to_heads(signs)))
            else:
                orders = _orders(generator, trial.groups, trial.values)
                changes.append((_taken(trial.v, orders), _taken(trial.o, trial.to_heads(orders))))
        if all(is_near(trial.look(v=v, o=o).out, base.out) for v, o in changes):
            v, o = changes[0]
            break
    else:
        raise Unproven("columns of its output projection do not meet the values that were read as theirs")
    if trial.values > 1 and (is_near(trial.look(v=v).out, base.out) or is_near(trial.look(o=o).out, base.out)):
        raise Unproven("its output does not depend on what was read as values and output projection")
    # Were it a gate, an output would follow its own token through these rows, as its queries do. With queries of zero
    # attention is spread over tokens: one that happens to look at its own token alone would pass for a gate.
    spread = trial.look(q=0 * trial.q)
    if is_near(spread.out, base.out):
        raise Unproven("its output does not depend on its scores")
    ways = torch.randn(2, trial.v.shape[-1], generator=generator, dtype=torch.float64)
    pushes = torch.zeros(trial.groups, trial.values, 1, dtype=torch.float64)
    pushes[:, 0] = PUSH
    # Every channel by another amount: a layer norm of the queries takes away what all have in common.
    queries = torch.zeros(trial.heads, trial.width, 1, dtype=torch.float64)
    queries[0] = PUSH * torch.randn(trial.width, 1, generator=generator, dtype=torch.float64)
    moves, own = [], []
    for way_D in ways:
        tokens_LX = trial.look(q=0 * trial.q, v=trial.v + pushes * way_D).tokens_LX
        if spread.tokens_LX is None or tokens_LX is None:
            raise Unproven("its output has no axis of tokens")
        moves.append(tokens_LX - spread.tokens_LX)
        pushed = trial.look(q=trial.q + queries * way_D).scores_HLL - base.scores_HLL
        own.append(pushed[0].diagonal()[:, None])
    # Token by token: the first of a causal layer has none but itself to look at.
    cross_L, size_L = (part.norm(dim=1) for part in off_multiple(torch.stack(moves), torch.stack(own)))
    clear_L = size_L > 1e-3 * size_L.max()
    if not clear_L.any():
        raise Unproven("its scores at a token's own place do not move with what was read as its query")
    if bool((cross_L <= PUSHED * size_L)[clear_L].all()):
        raise Unproven("what was read as values moves no other token's output: a gate")
    return _follow_values(trial, (base, spread), generator)


def _follow_values(trial: Trial, looks: tuple[Seen, Seen], generator: torch.Generator) -> str:
    """Test 6 of the note for values: the moves of a push of all of them, as it attends and with queries of zero."""
    tokens_LD, width = _tokens(trial.call, trial.v.shape[-1]), trial.o.shape[-1]
    before = [seen.tokens_LX for seen in looks if seen.tokens_LX is not None and seen.tokens_LX.shape[1] == width]
    if tokens_LD is None or len(before) < len(looks):
        if "values" in trial.alone:
            raise Unproven("its output has terms beside its values, and no tokens to tell them apart")
        return ""
    push = PUSH * torch.randn(trial.v.shape, generator=generator, dtype=torch.float64)
    values_HLK = tokens_LD @ trial.to_heads(push).mT
    by_head, evenly = (seen.reached_HLL.softmax(-1) @ values_HLK @ trial.o for seen in looks)
    pushed = (trial.look(v=trial.v + push).tokens_LX, trial.look(v=trial.v + push, q=0 * trial.q).tokens_LX)
    moves, even = (after - each for after, each in zip(pushed, before, strict=True) if after is not None)
    # What is mean over all tokens does not tell in which order they are; what is not, does.
    apart, wanted = moves - even, (by_head - evenly).sum(0)
    told = float(wanted.norm()) > PUSHED * float(evenly.norm())
    alike = _cosine(apart, wanted) if told else 1.0
    # The sign still shows where what stands in between, a norm say, leaves too little of the product to follow.
    if min(alike, _cosine(moves, by_head.sum(0)), _cosine(even, evenly.sum(0))) < -_LIKE:
        raise Unproven("its output follows the value-output product with the other sign")
    if trial.heads <= width:
        # The factor of every head, where that is all that stands between: over all heads, signs would cancel.
        parts, whole = by_head.flatten(1).mT, moves.flatten()[:, None]
        factors = torch.linalg.lstsq(parts, whole).solution
        if float((parts @ factors - whole).norm()) < PUSHED * float(whole.norm()) and bool((factors < 0).any()):
            head = int(factors.argmin())
            raise Unproven(f"the output of head {head} follows its value-output product with the other sign")
        if float(factors.min()) < _LEAST * float(factors.max()):
            return BESIDE  # in a head; all of them together may still follow
    if "values" in trial.alone and not is_near(moves, by_head.sum(0)):
        raise Unproven("its output is not the product of values and output projection, and terms beside it")
    remark = _followed(moves, by_head.sum(0), "its output", "the value-output product")
    return BESIDE if alike < _LIKE else remark


def _first_tokens(call: Call, width: int) -> tuple[Tensor, int] | None:
    """Return the first input of a layer and the axis of its channels, if it holds the tokens."""
    first = next((value for value in (*call.args, *call.kwargs.values()) if isinstance(value, Tensor)), None)
    if first is None or first.numel() != call.length * width or not first.is_floating_point():
        return None
    axis = next((i for i in (first.ndim - 1, 1) if first.ndim > i >= 0 and first.shape[i] == width), None)
    return None if axis is None else (first, axis)


def _tokens(call: Call, width: int) -> Tensor | None:
    """Return the tokens (L, d) that a layer is given, if its first input is those."""
    if (found := _first_tokens(call, width)) is None:
        return None
    first, axis = found
    return first.movedim(axis, -1).reshape(call.length, width).double()


def _every_second_moved(call: Call, width: int) -> Call | None:
    """Return a call with tokens 0, 2, … drawn anew wherever they stand, if its first input holds tokens."""
    if (found := _first_tokens(call, width)) is None:
        return None
    first, axis = found
    rows = first.movedim(axis, -1)
    tokens_LD = rows.reshape(call.length, width).clone()
    drawn = torch.randn(tokens_LD[::2].shape, generator=torch.Generator().manual_seed(10), dtype=torch.float64)
    tokens_LD[::2] = drawn.to(first.dtype)
    other = tokens_LD.reshape(rows.shape).movedim(-1, axis)

    def exchanged(value: Any) -> Any:
        return other if isinstance(value, Tensor) and torch.equal(value, first) else value

    kwargs = {name: exchanged(value) for name, value in call.kwargs.items()}
    return replace(call, args=tuple(map(exchanged, call.args)), kwargs=kwargs)


def _followed(found: Tensor, product: Tensor, what: str, name: str) -> str:
    """Return in words how what was found differs from a product, or refuse the other sign."""
    dot, size = float((found * product).sum()), float(product.norm() * found.norm())
    if dot < -_FOLLOWED * size:
        raise Unproven(f"{what} follows {name} with the other sign")
    if dot < _FOLLOWED * size:
        return BESIDE
    factor = dot / float(product.square().sum())
    # What follows it roughly has a rough factor.
    low, high = (1 / _OFF, _OFF) if dot > (1 - _EXACT) * size else _FACTORS
    return "" if low <= factor <= high else f"{what}: {factor:.2g} times {name}"


def _cosine(found: Tensor, wanted: Tensor) -> float:
    size = float(found.norm() * wanted.norm())
    return float((found * wanted).sum()) / size if size else 1.0


def _signs(generator: torch.Generator, *shape: int) -> Tensor:
    """Return signs of which at least one is −1, so that they change something."""
    signs = torch.randint(2, shape, generator=generator).double() * 2 - 1
    signs.view(-1)[0] = -1
    return signs


def _orders(generator: torch.Generator, count: int, size: int) -> Tensor:
    """Return a permutation of the channels for each head or group, (count, size): its own, so that it tells heads.

    None of them leaves all in place.
    """
    orders = torch.stack([torch.randperm(size, generator=generator) for _ in range(count)])
    return torch.where((orders == torch.arange(size)).all(1, keepdim=True), orders.flip(1), orders)


def _taken(part: Tensor, orders: Tensor) -> Tensor:
    return part.take_along_dim(orders[..., None], 1)
