"""Attention with something turned in one place, read by its own forward pass: what is written has the asked sign."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import espalier
from espalier.errors import EspalierError

DIM, HEADS = 24, 4
SPEC = espalier.Mimetic(qk=(0.0, 0.7), vo=(0.0, -0.4))
SHAPES = {"number": (), "one": (1, 1, 1), "heads": (HEADS, 1, 1), "batched heads": (1, HEADS, 1, 1), "axis": (1, DIM)}


class Twisted(nn.Module):
    """Fused self-attention; ``how`` names what stands in it besides."""

    def __init__(self, *how: str, shape: tuple[int, ...] = (), factor: float = 1.0) -> None:
        super().__init__()
        self.num_heads, self.how = HEADS, how
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM, bias=False), nn.Linear(DIM, DIM, bias=False)
        self.register_buffer("first", torch.tensor([-1.0] + [1.0] * (HEADS - 1)).view(HEADS, 1, 1))
        if "map" in how:
            self.before = nn.Linear(DIM, DIM, bias=False)
        if "norm" in how:
            self.q_norm, self.k_norm = nn.RMSNorm(DIM // HEADS), nn.RMSNorm(DIM // HEADS)
        self.factor = nn.Parameter(torch.full(shape, factor))
        self.logits = torch.zeros(0)

    def forward(self, x: Tensor) -> Tensor:
        how = self.how
        x = self.before(x) if "map" in how else x
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        if "norm" in how:
            q, k = self.q_norm(q), self.k_norm(k)
        v = v.roll(1, 2) if "values of the token before" in how else v
        logits = q @ k.mT / (DIM // HEADS) ** 0.5
        logits = logits * self.first if "first head turned" in how else logits
        self.logits = logits = logits * self.factor if "scores" in how else logits
        if "bqhk" in how:
            weights = logits.transpose(1, 2).softmax(-1).transpose(1, 2)
        else:
            weights = logits.movedim(1, -1).softmax(-2).movedim(-1, 1) if "bqkh" in how else logits.softmax(-1)
        out = self.proj((weights @ v).transpose(1, 2).flatten(2))
        out = out * self.factor if "output" in how else out
        return out.flip(1) if "other order" in how else out


def written(layer: Twisted) -> str | None:
    """Return the note of a written layer, or ``None`` if it is left alone."""
    try:
        generator = torch.Generator().manual_seed(0)
        [row] = espalier.structure_(layer, attention=SPEC, depthwise=None, generator=generator).layers
    except EspalierError:
        return None
    return row.note


@torch.no_grad()
def diagonals(layer: Twisted) -> tuple[Tensor, float]:
    """Return the mean score of a unit token with itself, of every head, and its mean share of its own output."""
    scores, own = torch.zeros(HEADS, dtype=torch.float64), 0.0
    for place, token in enumerate(torch.eye(DIM, dtype=torch.float64)):
        own += float(layer(token[None, None])[0, 0, place]) / DIM
        scores += layer.logits.flatten() / DIM
    return scores, own


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("where", ["scores", "output"])
def test_the_sign_of_a_factor_is_seen_whatever_its_shape(where: str, shape: str) -> None:
    if (where == "scores") == (shape == "axis") or (where == "output" and "heads" in shape):
        return
    for factor in (1.0, 0.3, -1.0):
        layer = Twisted(where, shape=SHAPES[shape], factor=factor).double()
        assert (written(layer) is None) == (factor < 0)
        if factor > 0:
            scores, own = diagonals(layer)
            assert scores.min() > 0.05 * factor
            assert own < -0.1 * factor


@pytest.mark.parametrize("turned", ["first head turned", "scores"])
@pytest.mark.parametrize("around", [(), ("map",), ("norm",), ("map", "norm")])
def test_scores_of_the_other_sign_are_refused_whatever_stands_before_the_projections(
    turned: str, around: tuple[str, ...]
) -> None:
    assert written(Twisted(*around, turned, factor=-1.0).double()) is None
    layer = Twisted(*around).double()
    assert written(layer) is not None
    assert diagonals(layer)[0].min() > 0


@pytest.mark.parametrize("layout", ["bqhk", "bqkh"])
def test_scores_may_have_their_heads_behind_the_queries(layout: str) -> None:
    layer = Twisted(layout).double()
    assert written(layer) is not None
    scores, own = diagonals(layer)
    assert scores.min() > 0.05
    assert own < -0.1


@pytest.mark.parametrize("how", ["values of the token before", "other order"])
def test_values_or_outputs_of_other_tokens_are_noted(how: str) -> None:
    note = written(Twisted(how).double())
    assert note is None or "its products are not those of its tokens" in note
    assert "those of its tokens" not in str(written(Twisted().double()))
