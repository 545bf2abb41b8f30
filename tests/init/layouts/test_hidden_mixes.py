"""Attention in which something that a proof may overlook changes the products: left alone, or right by a forward pass.

The oracle is the model as it is, in float64: how a score of tokens i and j moves with both, and how an output moves
with another token where attention is even.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import espalier
from espalier.errors import EspalierError

DIM, HEADS, LENGTH = 16, 2, 5


def by_heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def earlier(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 1, 0))[..., :-1, :]


class Plain(nn.Module):
    """Self-attention by the book; parts of it are changed below."""

    def __init__(self, **numbers: Tensor) -> None:
        super().__init__()
        self.num_heads = HEADS
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, nn.Linear(DIM, DIM, bias=False))
        for name, value in numbers.items():
            setattr(self, name, nn.Parameter(value))

    def maps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.mT * q.shape[-1] ** -0.5

    def forward(self, x: Tensor, sign: float = 1.0, order: str = "h k") -> Tensor:
        q, k, v = map(by_heads, self.maps(x))
        weights = self.scores(q, k).softmax(-1)
        attended = (weights @ v * sign).transpose(1, 2)
        return self.out_proj((attended if order == "h k" else attended.transpose(2, 3)).flatten(2))


class ShiftedKeys(Plain):
    def maps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_proj(x), self.k_proj(x * self.mu + earlier(x) * (1 - self.mu)), self.v_proj(x)


class ScoresOfTheTokenBefore(Plain):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        before = super().scores(q, earlier(k))
        return self.alpha * super().scores(q, k) + (1 - self.alpha) * before


class Complement(Plain):
    def forward(self, x: Tensor, *given: Any) -> Tensor:
        out = super().forward(x, *given)
        return self.lam * out - (1 - self.lam) * out


class Trained(Plain):
    """Its keys are other tokens' in training, the mode that a new model is in; with dropout, or without."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.shift, self.attn_dropout, self.dropout = shift, 0.1, nn.Dropout(0.1)

    def maps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys = earlier(x) if self.training and self.shift else x
        p = self.attn_dropout if self.training else 0.0
        return self.q_proj(x), self.dropout(self.k_proj(keys)), F.dropout(self.v_proj(x), p) if p else self.v_proj(x)


class Scaled(Plain):
    def forward(self, x: Tensor, *given: Any) -> Tensor:
        return self.gamma * super().forward(x, *given)


class LowRank(Plain):
    """With factors of these names beside queries, or values."""

    first, second, beside = "a_q", "b_q", 0

    def maps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        maps = list(super().maps(x))
        maps[self.beside] = maps[self.beside] + x @ getattr(self, self.first) @ getattr(self, self.second)
        return maps[0], maps[1], maps[2]


class Memory(Plain):
    """With keys and values of its own, and a map of the values where there is one."""

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        q, k, v = self.maps(x)
        v = v if not hasattr(self, "mix") else v - v @ self.mix
        k, v = (torch.cat([part, more.expand(len(x), -1, -1)], 1) for part, more in ((k, self.mem_k), (v, self.mem_v)))
        q, k, v = map(by_heads, (q, k, v))
        return self.out_proj((self.scores(q, k).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Away(Plain):
    """The residual stands inside, with the other sign."""

    def forward(self, x: Tensor, *given: Any) -> Tensor:
        return F.layer_norm(x - super().forward(x, *given), (DIM,))


class LessItself(Plain):
    def forward(self, x: Tensor, *_: Any) -> Tensor:
        q, k, v = map(by_heads, self.maps(x))
        attended = v - self.scores(q, k).softmax(-1) @ v
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class Owner(nn.Module):
    def __init__(self, call: Callable[[Any, Tensor], Tensor], attn: nn.Module | None = None) -> None:
        super().__init__()
        self.attn, self.norm, self.call = attn or Plain(), nn.LayerNorm(DIM), call

    def forward(self, x: Tensor) -> Tensor:
        return x + self.call(self.attn, self.norm(x))


def fused(attn: Plain, x: Tensor) -> Tensor:
    q, k, v = map(by_heads, attn.maps(x))
    return attn.out_proj((attn.scores(q, -k).softmax(-1) @ v).transpose(1, 2).flatten(2))


def memory(**more: Tensor) -> Memory:
    return Memory(mem_k=torch.randn(1, 2, DIM), mem_v=torch.randn(1, 2, DIM), **more)


def low_rank(first: str, second: str, beside: int) -> nn.Module:
    kind = type("LowRankOf", (LowRank,), {"first": first, "second": second, "beside": beside})
    return kind(**{first: torch.randn(DIM, 4), second: torch.randn(4, DIM)})


HIDDEN: dict[str, Callable[[], nn.Module]] = {
    **{f"token shift {mu}": lambda mu=mu: ShiftedKeys(mu=torch.full((DIM,), mu)) for mu in (0.0, 0.5)},
    "scores of the token before": lambda: ScoresOfTheTokenBefore(alpha=torch.zeros(HEADS, 1, 1)),
    "complement": lambda: Complement(lam=torch.zeros(DIM)),
    **{
        f"factors {names}": lambda names=names, beside=beside: low_rank(*names, beside)
        for names, beside in ((("a_q", "b_q"), 0), (("a", "b"), 1), (("b_a", "b_b"), 2), (("bq", "bk"), 0))
    },
    "memory beside a map of values": lambda: memory(mix=2 * torch.eye(DIM)),
    "other keys in training": lambda: Trained(1),
    "away": Away,
    "less itself": LessItself,
    "owner's sign": lambda: Owner(lambda attn, x: attn(x, -1.0)),
    "owner's order of heads": lambda: Owner(lambda attn, x: attn(x, 1.0, "k h")),
    "owner's own product": lambda: Owner(fused),
}
PLAIN: dict[str, Callable[[], nn.Module]] = {
    "alone": Plain,
    "dropout": lambda: Trained(0),
    "in an owner": lambda: Owner(lambda attn, x: attn(x)),
    "memory": memory,
    "factors of the output": lambda: Owner(lambda attn, x: attn(x), Scaled(gamma=torch.full((DIM,), 0.1))),
}


class Watched(TorchFunctionMode):
    """Keeps the scores, and makes attention even where that is asked."""

    def __init__(self, *, even: bool) -> None:
        super().__init__()
        self.even, self.scores = even, torch.zeros(0)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.softmax:
            self.scores = args[0]
            args = (torch.zeros_like(args[0]) if self.even else args[0], *args[1:])
        return func(*args, **(kwargs or {}))


def signs(model: nn.Module) -> tuple[Tensor, float]:
    """Return what stands for W_Q W_Kᵀ of each head and for W_V W_out: the traces of their effects on other tokens."""
    model = model.double()
    for part in model.modules():
        if isinstance(part, Trained):
            part.dropout.p, part.attn_dropout = 0.0, 0.0
    x = torch.randn(1, LENGTH, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    i, j = LENGTH - 1, 1

    def at(row_i: Tensor, row_j: Tensor, *, even: bool) -> tuple[Tensor, Tensor]:
        rows = [row_i if place == i else row_j if place == j else x[0, place] for place in range(LENGTH)]
        with Watched(even=even) as watched:
            out = model(torch.stack(rows)[None])
        return watched.scores[0, :, i, j], out[0, i]

    heads = []
    for head in range(HEADS):
        both = torch.autograd.functional.hessian(lambda a, b: at(a, b, even=False)[0][head], (x[0, i], x[0, j]))  # noqa: B023
        heads.append(both[0][1].trace())
    moved = torch.autograd.functional.jacobian(lambda b: at(x[0, i], b, even=True)[1], x[0, j])
    return torch.stack(heads), float(moved.trace())


def is_right(make: Callable[[], nn.Module]) -> bool | None:
    """Return whether what is written has the signs that it was asked for, or None where it is left alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make()
    own = {name: value.clone() for name, value in model.named_parameters() if "proj" not in name}
    try:
        espalier.structure_(model, generator=torch.Generator().manual_seed(0))
    except EspalierError:
        return None
    finally:
        assert all(torch.equal(value, own[name]) for name, value in model.named_parameters() if name in own)
    of_heads, of_values = signs(model)
    return bool((of_heads > 0).all()) and of_values < 0


@pytest.mark.parametrize("name", HIDDEN)
def test_what_is_hidden_is_left_alone_or_right(name: str) -> None:
    assert is_right(HIDDEN[name]) is not False


@pytest.mark.parametrize("name", PLAIN)
def test_what_is_plain_is_written_and_right(name: str) -> None:
    assert is_right(PLAIN[name])


class Crossed(nn.Module):
    """Attention that says that it is none across sequences, as diffusers does where both are as wide."""

    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.attn2 = Named(), Named()

    def forward(self, x: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        x = x + self.attn1(x)
        return x + self.attn2(x, encoder_hidden_states)


class Named(Plain):
    is_cross_attention = False

    def forward(self, x: Tensor, encoder_hidden_states: Tensor | None = None) -> Tensor:  # type: ignore[override]
        keys = x if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = map(by_heads, (self.q_proj(x), self.k_proj(keys), self.v_proj(keys)))
        return self.out_proj((self.scores(q, k).softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_a_layer_that_denies_other_keys_is_believed_where_its_owner_cannot_be_run_alone() -> None:
    rows = espalier.structure_(Crossed(), generator=torch.Generator().manual_seed(0)).layers
    assert {row.layer: row.status for row in rows} == {"attn1": "written", "attn2": "skipped"}
