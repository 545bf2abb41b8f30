"""Whose tokens a layer's keys and values are where its model calls it: the caller is run, and the layer watched in it.

However they reach the layer (an argument of any name, a list, an attribute set before, a closure), keys and values of
other tokens than the queries' show in two ways. Rows that are pushed along a direction that no token of the queries has
move what the layer returns; and a score at (i, i) follows another token through W_K than through W_Q.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from itertools import starmap
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from espalier.init.layouts.arguments import NAMELESS
from espalier.init.layouts.compare import (
    PUSH,
    by_query,
    columns_of,
    is_close,
    is_near,
    is_open,
    of_tokens,
    same_direction,
    sink_of,
)
from espalier.init.layouts.examples import examples_meet
from espalier.init.layouts.heads_apart import groups_of, put_together
from espalier.init.layouts.keys import NUMBERS, module_key
from espalier.init.layouts.owners import calls_of_owner
from espalier.init.layouts.positions import differing, moved, tokens_alike, without_positions
from espalier.init.layouts.probe_attention import prove_attention
from espalier.init.layouts.registry import AttentionWeights, Layout
from espalier.init.layouts.scratch import Call, CannotRunError, copy_for_probe, fresh, leaves, run, untraced, watch
from espalier.init.layouts.trial import Misfit, Softmaxes, Unproven
from espalier.init.layouts.verdicts import KNOWN
from espalier.init.layouts.whole_model import one_sequence


class _Enough(BaseException):  # owners may catch every Exception and go on in another way
    """All that a run shows of the part has been seen: what its owner does afterwards takes time and says nothing."""


class _Seen(NamedTuple):
    """One run: what reached the softmaxes of the part's first call, and all that its calls returned."""

    scores: list[Tensor]
    out: Tensor


@untraced()
def meets_others(
    owner: nn.Module, path: str, reading: Layout, widths: Sequence[int], heads: int, given: Collection[str]
) -> bool:
    """Return whether a part's keys or values come from other tokens than its queries when a copy of its owner runs.

    Args:
        owner: the module that calls it.
        path: of the part.
        reading: the layout that reads the part's weights.
        widths: of a token, to try.
        heads: see ``calls``.
        given: names of optional arguments of the owner that are given.

    Raises:
        Unproven: the owner takes parts of it without calling it, or turns the sign of its keys.
        CannotRunError: the owner runs on no made-up inputs, or never calls the part.
    """
    watch = _Watch(copy_for_probe(owner), path, reading)
    base = watch.start(calls_of_owner(owner, widths, heads, given, pairs=True))
    # A layer that makes of the same inputs what one of another number made, by the same code, has that one's verdict.
    group = ("others alike", module_key(owner, NUMBERS, signs=True), path, reading, *widths, heads, *given)
    before, verdict = KNOWN.get(group, (None, False))
    if before is None or not _alike(base, before):
        KNOWN[group] = base, (verdict := _takes_others(watch, base))
        if not verdict:
            watch.prove_as_called()
    return verdict


def _alike(base: _Seen, other: _Seen) -> bool:
    if [part.shape for part in (*base.scores, base.out)] != [part.shape for part in (*other.scores, other.out)]:
        return False
    scores = zip(base.scores, other.scores, strict=True)
    return is_near(base.out, other.out) and all(is_close(now, then, then) for now, then in scores)


def _takes_others(watch: _Watch, base: _Seen) -> bool:
    """Return whether changed weights of a part show that its keys or values are other tokens'; see ``meets_others``."""
    generator = torch.Generator().manual_seed(5)
    way_D = watch.unseen(generator)
    parts = {name: getattr(watch.views, name) for name in ("q", "k", "v")}
    # By how much each row is pushed along a way: the same for every way.
    rows = {
        name: torch.randn(*part.shape[:-1], 1, generator=generator, dtype=torch.float64) for name, part in parts.items()
    }
    # Where the queries have it all the same (a map stands before them), this says nothing.
    if way_D is not None:
        by_q, *others = (watch.look(**{name: rows[name] * way_D}) for name in rows)
        kept = is_near(by_q.out, base.out) and all(
            is_close(a, b, b) for a, b in zip(by_q.scores, base.scores, strict=True)
        )
        if kept and not all(is_near(pushed.out, base.out) for pushed in others):
            return True
    ways = torch.randn(2, watch.views.q.shape[-1], generator=generator, dtype=torch.float64)
    along_q, along_k = ([watch.look(**{name: PUSH * rows[name] * way}).scores for way in ways] for name in ("q", "k"))
    runs = zip(base.scores, zip(*along_q, strict=True), zip(*along_k, strict=True), strict=True)
    if any(starmap(_other_tokens, runs)) or watch.examples_meet():
        return True
    # With the rows of the keys in the place of the queries' a token that meets itself scores above zero.
    k = parts["k"] if parts["k"].ndim == 3 else parts["k"].unflatten(0, (watch.views.num_kv_heads, -1))
    as_q = k.repeat_interleave(watch.views.num_heads // watch.views.num_kv_heads, 0).reshape(parts["q"].shape)
    queries = [{"q": sign * as_q - parts["q"]} for sign in (1, -1)]
    alike, opposed = (watch.look(**query).scores for query in queries)
    # Queries may have terms of their own, as with relative positions: what is left without keys.
    without = [watch.look(**query, k=-parts["k"]).scores for query in queries]
    own = []
    for a, b, a0, b0, base_scores, *pushed in zip(alike, opposed, *without, base.scores, *along_k, strict=True):
        columns = _columns(base_scores, pushed)
        sink = sink_of(base_scores, columns)
        met = [of_tokens(scores, columns, sink).diagonal(0, -2, -1) for scores in (a, b, a0, b0)]
        own.append((met[0] - met[1] - met[2] + met[3])[is_open(met[0])])
    if any(bool((scores < 0).any()) for scores in own):
        raise Unproven("whoever calls it hands it keys with the other sign")
    return False


def _other_tokens(base: Tensor, by_q: Sequence[Tensor], by_k: Sequence[Tensor]) -> bool:
    """Return whether scores that follow these queries are of other tokens' keys: test 3 of ``probe_attention``."""
    if all(torch.equal(scores, base) for scores in by_q):
        return False
    columns = _columns(base, by_k)
    if len(columns) != base.shape[-2]:
        return True
    sink = sink_of(base, columns)
    still = of_tokens(base, columns, sink).diagonal(0, -2, -1)
    own_q, own_k = (
        torch.stack([of_tokens(scores, columns, sink).diagonal(0, -2, -1) - still for scores in pushed])
        for pushed in (by_q, by_k)
    )
    return not same_direction(own_q, own_k, is_open(still))


def _columns(scores: Tensor, by_k: Sequence[Tensor]) -> Tensor:
    """Return the columns of tokens: the others are sinks, or keys that are parameters."""
    more = scores.shape[-1] > scores.shape[-2]
    return columns_of(scores, by_k) if more else torch.arange(scores.shape[-1])


class _Watch:
    """Runs of a copy of an owner, with changed weights of one of its parts, which is watched."""

    def __init__(self, twin: nn.Module, path: str, reading: Layout) -> None:
        self.twin, self.part = twin, twin.get_submodule(path)
        put_together(self.part, groups_of(reading))
        views = reading(self.part)
        if not isinstance(views, AttentionWeights):
            raise CannotRunError("its copy reads otherwise")
        self.views = views
        self.call: Call | None = None
        self.given: list[Call] = []
        self.positions: list[set[int | str]] = []
        self.inside, self.begun, self.softmaxes = 0, 0, Softmaxes()
        self.tokens: list[Tensor] = []
        self.outs: list[Tensor] = []
        self.made: list[Tensor] = []
        self.scores: list[Tensor] | None = None
        self.taken = False
        self.calls, self.most = 0, 0  # calls of the part in a run, and after how many it is stopped: never, if 0
        watch(self.part, self._enter, self._leave)
        held = {view.untyped_storage()._cdata for view in (views.q, views.k, views.v)}
        for holder in [*self.part.modules()][1:]:
            if any(own.untyped_storage()._cdata in held for own in holder.parameters(recurse=False)):
                watch(holder, self._take)

    def _enter(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        self.inside, self.begun = self.inside + 1, len(self.softmaxes.inputs)
        call, place = Call(args, kwargs, 0), len(self.given)
        self.given.append(Call(fresh(args), fresh(kwargs), 0))
        if place < len(self.positions):
            call = without_positions(call, self.positions[place])
        first = next(leaves((*args, *kwargs.values())), None)
        self.tokens += [] if first is None else [first.detach().clone()]
        return call.args, call.kwargs

    def _leave(self, out: Any) -> None:
        self.inside -= 1
        made = [part for part in leaves(out) if part.is_floating_point()]
        self.made += made
        self.outs += [part.flatten().double() for part in made]
        # What a second call sees may follow from the first.
        self.scores = self.softmaxes.inputs[self.begun :] if self.scores is None else self.scores
        self.calls += out is not None and not self.inside
        if out is not None and self.calls == self.most:
            raise _Enough

    def _take(self, *_: Any) -> None:
        self.taken |= not self.inside

    def start(self, made: Iterable[Call]) -> _Seen:
        """Return the first run in which the part is called."""
        why = ""
        for call in made:
            self.call = call
            try:
                seen = self.look()
                if any(map(differing, self.given)):
                    self.call = moved(call)
                    self.positions = tokens_alike([*self.given], self.given, self.look)
                    self.call = call
                    seen = self.look()
                if not seen.scores or any(scores.shape[-1] > 1 for scores in seen.scores):
                    self.most = self.calls
                    return seen
                why = why or "it attends over one token"
            except CannotRunError as error:
                why = why or str(error)
        owner = type(self.twin).__name__
        raise CannotRunError(f"{owner}, which calls it, does not run on made-up inputs ({why or NAMELESS})")

    def look(self, **pushes: Tensor) -> _Seen:
        """Run with pushes added to some of q, k and v."""
        assert self.call is not None
        self.tokens, self.outs, self.scores, self.inside, self.softmaxes = [], [], None, 0, Softmaxes()
        self.made, self.calls = [], 0
        self.given.clear()
        kept = {name: getattr(self.views, name).clone() for name in pushes}
        made = list[Tensor]()
        try:
            for name, push in pushes.items():
                getattr(self.views, name).add_(push)
            with self.softmaxes:
                made = run(self.twin, self.call)
        except _Enough:
            pass
        except CannotRunError:
            if not self.outs:  # what fails after the part does not matter
                raise
        finally:
            for name, value in kept.items():
                getattr(self.views, name).copy_(value)
        if self.taken:
            raise Unproven(f"{type(self.twin).__name__} takes parts of it without calling it")
        if not self.outs:
            if self._moves(made):
                raise Unproven(f"{type(self.twin).__name__} takes its weights without calling it")
            raise CannotRunError("it does not call it")
        return _Seen(list(map(by_query, self.scores or [])), torch.cat(self.outs))

    def prove_as_called(self) -> None:
        """Prove the part on what it was handed first, options and all, where it runs on that alone.

        Raises:
            Unproven: it computes something else there than on inputs of its own signature.
        """
        self.most, self.positions = 0, []
        with suppress(Misfit, CannotRunError):
            call = one_sequence(self.part, self.given[0], self.views.q.shape[-1])
            prove_attention(self.part, self.views, call)

    def _moves(self, made: list[Tensor]) -> bool:
        """Return whether what the owner makes without calling the part follows the part's weights all the same."""
        assert self.call is not None
        for view in (self.views.q, self.views.k, self.views.v):
            kept = view.clone()
            view.mul_(-2.0)
            try:
                again = run(self.twin, self.call)
            finally:
                view.copy_(kept)
            if not all(now.shape == then.shape and is_near(now, then) for now, then in zip(again, made, strict=False)):
                return True
        return False

    def examples_meet(self) -> bool:
        """Return whether what the part makes of an example depends on others of its batch."""
        call, most, self.most = self.call, self.most, 0  # a batch may be taken one by one

        def look(other: Call) -> list[Tensor]:
            self.call = other
            self.look()
            return self.made

        try:
            return call is not None and examples_meet(look, call)
        finally:
            self.call, self.most = call, most

    def unseen(self, generator: torch.Generator) -> Tensor | None:
        """Return a unit vector that no token has that the part was given first, if there is one."""
        width = self.views.q.shape[-1]
        if any(part.shape[-1:] != (width,) or not part.is_floating_point() for part in self.tokens):
            return None
        tokens_ND = torch.cat([part.reshape(-1, width).double() for part in self.tokens])
        if len(tokens_ND) >= width:
            return None
        basis_DR = torch.linalg.qr(tokens_ND.mT).Q
        way_D = torch.randn(width, generator=generator, dtype=torch.float64)
        way_D = way_D - basis_DR @ (basis_DR.mT @ way_D)
        return way_D / way_D.norm()
