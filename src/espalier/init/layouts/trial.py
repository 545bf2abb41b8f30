"""Runs of a copy of an attention layer with changed weights, and what reaches its softmax in them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from espalier.init.layouts.compare import (
    PUSH,
    by_query,
    by_token,
    columns_of,
    is_close,
    is_near,
    is_open,
    of_tokens,
    sink_of,
)
from espalier.init.layouts.heads_apart import is_linear
from espalier.init.layouts.registry import AttentionWeights
from espalier.init.layouts.scratch import Call, is_bias, is_vector, run

# Keys that are parameters, beside those of tokens.
_MOST_SINKS = 64
# A sink's score that leaves all attention to the tokens.
_NO_SINK = -50.0


class Unproven(Exception):
    """The views are not what the module computes with, and how that shows."""


class Misfit(Unproven):
    """The scores are not even of the shape expected: inputs of another form may do better."""


class Seen(NamedTuple):
    """One run: scores (H, L, L), what the output projection makes in one vector, and the first of it by token.

    Of the scores that reached the softmax the others are the product of queries and keys alone, where that is asked.
    """

    scores_HLL: Tensor
    reached_HLL: Tensor
    out: Tensor
    tokens_LX: Tensor | None


class Softmaxes(TorchDispatchMode):
    """Keeps what reaches every softmax, and along which axis it is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []

    def __enter__(self) -> Softmaxes:
        flex = getattr(sys.modules.get("torch.nn.attention.flex_attention"), "flex_attention_hop", None)
        if flex is not None and Softmaxes not in flex.python_key_table:
            flex.py_impl(Softmaxes)(_flex_attention)
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._softmax.default, torch.ops.aten._safe_softmax.default):
            scores, dim = args[:2]
            self.inputs.append(scores.movedim(dim, -1).detach().clone())
        return func(*args, **(kwargs or {}))


def _flex_attention(mode: Softmaxes, *args: Any, **kwargs: Any) -> Any:
    """Take flex attention's scores and softmax one by one, as the mode can see them."""
    from torch._higher_order_ops.flex_attention import math_attention

    with mode:
        return math_attention(*args, **kwargs)


class Trial:
    """Runs of a copy with changed weights, seen as (heads or groups, channels, d): q, k, v and the transpose of out."""

    def __init__(self, module: nn.Module, weights: AttentionWeights, call: Call) -> None:
        self.module, self.call, self.heads, self.groups = module, call, weights.num_heads, weights.num_kv_heads
        self.q, self.k = by_head(weights.q, self.heads), by_head(weights.k, self.groups)
        self.v, self.o = by_head(weights.v, self.groups), by_head(weights.out.mT, self.heads)
        self.width, self.values, self.share = self.k.shape[1], self.v.shape[1], self.heads // self.groups
        self.columns: Tensor | None = None
        self.sink: list[int] = []
        # Which products are looked at without terms of one of their factors alone: of "scores", and of "values".
        self.alone: set[str] = set()
        self.ends: list[int] = []  # places of outputs, of all that it returns, that the output projection makes

    def _leave_sinks_out(self, base: Tensor) -> None:
        """Keep the columns of tokens alone, where more keys than those are attended to, and shut these off.

        What no token's key makes is a sink, or a parameter, which the proof can do without, as their values meet the
        output projection and not that of the values.
        """
        kept = self.k.clone()
        self.k.add_(PUSH * torch.randn(self.k.shape, generator=torch.Generator().manual_seed(6)))
        with Softmaxes() as seen:
            run(self.module, self.call)
        self.k.copy_(kept)
        self.columns = columns_of(base, [s for s in map(by_query, seen.inputs) if s.shape == base.shape])
        self.sink = sink_of(base, self.columns)
        held = {part.untyped_storage()._cdata for part in (self.q, self.k, self.v, self.o)}
        for part in self.module.modules():
            for name, parameter in part.named_parameters(recurse=False):
                if parameter.untyped_storage()._cdata in held or is_linear(part) or is_bias(part, name):
                    continue
                if not is_vector(name, parameter):
                    self._leave_out(parameter)
                elif "sink" in name:
                    parameter.fill_(_NO_SINK)

    def _leave_out(self, memory: Tensor) -> None:
        """Make a parameter zero if all that follows it is attended to beside the tokens: keys and values of its own."""
        push = PUSH * torch.randn(self.v.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        kept = memory.clone()

        def by_tokens() -> tuple[Tensor, Tensor]:
            """Return their scores, and what a push of the values does where attention is even."""
            scores = self._look({}).scores_HLL
            still, pushed = (self._look({"q": 0 * self.q, "v": self.v + more}).out for more in (0 * push, push))
            return scores, pushed - still

        scores, moved = by_tokens()
        memory.zero_()
        now, then = by_tokens()
        if not (is_close(now, scores, scores) and is_near(then, moved)):
            memory.copy_(kept)

    def to_heads(self, of_groups: Tensor) -> Tensor:
        """Return for each head what its group has."""
        return of_groups.repeat_interleave(self.share, 0)

    def look(self, **changed: Tensor) -> Seen:
        """Run with some of q, k, v and o replaced; the copy is left as it was."""
        seen = self._look(changed)
        if not self.alone:
            return seen
        no_q, no_k, no_v = ({name: torch.zeros_like(getattr(self, name))} for name in ("q", "k", "v"))
        if "scores" in self.alone:
            of_k, of_q, rest = (self._look({**changed, **less}).scores_HLL for less in (no_q, no_k, {**no_q, **no_k}))
            product = torch.where(is_open(seen.scores_HLL), seen.scores_HLL - of_q - of_k + rest, seen.scores_HLL)
            seen = seen._replace(scores_HLL=product)
        if "values" in self.alone:
            rest_of = self._look({**changed, **no_v})
            tokens = [each.tokens_LX for each in (seen, rest_of)]
            moved = tokens[0] - tokens[1] if tokens[0] is not None and tokens[1] is not None else None
            seen = seen._replace(out=seen.out - rest_of.out, tokens_LX=moved)
        return seen

    def terms(self) -> set[str]:
        """Return which products have terms of one factor alone beside them, as relative positions make them."""
        no_q, no_k, no_v, no_o = ({name: torch.zeros_like(getattr(self, name))} for name in ("q", "k", "v", "o"))
        of_k, of_q, rest = (self._look(less).scores_HLL for less in (no_q, no_k, {**no_q, **no_k}))
        found = set() if is_close(of_k, rest, rest) and is_close(of_q, rest, rest) else {"scores"}
        return found if is_near(self._look(no_v).out, self._look(no_o).out) else {*found, "values"}

    def _look(self, changed: Mapping[str, Tensor]) -> Seen:
        kept = {name: getattr(self, name).clone() for name in changed}
        try:
            for name, value in changed.items():
                getattr(self, name).copy_(value)
            with Softmaxes() as seen:
                tensors = run(self.module, self.call)
            if not self.ends:
                # A layer may return its values or scores, too.
                self.o.neg_()
                turned = run(self.module, self.call)
                self.o.neg_()
                pairs = enumerate(zip(tensors, turned, strict=True))
                self.ends = [place for place, (a, b) in pairs if not is_near(b, a)] or [*range(len(tensors))]
        finally:
            for name, value in kept.items():
                getattr(self, name).copy_(value)
        length = self.call.length
        wide = [s for s in map(by_query, seen.inputs) if s.shape[-2] == length < s.shape[-1] <= length + _MOST_SINKS]
        if len(wide) == 1 and self.columns is None:
            self._leave_sinks_out(wide[0])
            return self._look(changed)
        made = [tensors[place] for place in self.ends]
        scores, out = self._scores(seen.inputs), torch.cat([part.flatten().double() for part in made])
        return Seen(scores, scores, out, by_token(made[0], length))

    def squares(self) -> Tensor:
        """Return what stands for q·k at (i, i), twice, where rows of queries are those of keys: (H, L).

        A token then meets itself, whatever stands before the rows: the sign is that of the product in the scores.
        """
        k_HKD = self.to_heads(self.k).clone()
        scores, opposed = (self.look(q=q_HKD).scores_HLL.diagonal(0, 1, 2) for q_HKD in (k_HKD, -k_HKD))
        return scores - opposed

    def _scores(self, inputs: list[Tensor]) -> Tensor:
        length = self.call.length
        inputs = list(map(by_query, inputs))
        if self.columns is not None:
            inputs = [
                of_tokens(s, self.columns, self.sink) if s.shape[-2] == length < s.shape[-1] else s for s in inputs
            ]
        square = [s for s in inputs if s.shape[-2:] == (length, length)]
        fits = [s for s in square if s.numel() == self.heads * length**2]
        if len(square) == self.heads > 1 and all(s.numel() == length**2 for s in square):
            fits = [torch.stack(square)]  # a softmax for each head
        if len(fits) == 1:
            return fits[0].reshape(self.heads, length, length).double()
        if len(fits) > 1:
            raise Unproven("it takes several softmaxes over the tokens")
        shapes = ", ".join(str(tuple(s.shape)) for s in inputs[:2])
        if not shapes:
            raise Misfit("no softmax was seen: it is no softmax attention, or not in a form that can be watched")
        if any(s.shape[-1] < length and s.shape[-2] == length for s in inputs):
            raise Misfit(f"{length} queries meet fewer keys (scores {shapes}): keys from a shorter sequence")
        raise Misfit(f"its scores, {shapes}, are not those of {self.heads} heads over {length} tokens")


def by_head(part: Tensor, count: int) -> Tensor:
    """Return a view of (count·K, d) or (count, K, d) weights as (count, K, d)."""
    return part if part.ndim == 3 else part.unflatten(0, (count, -1))
