"""Attention whose heads are modules of their own: written as one layer, right by a forward pass, or left alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import espalier
from espalier.errors import EspalierError
from espalier.init.layouts import AttentionWeights, find_layers

DIM, LENGTH = 24, 7
SPEC = espalier.Mimetic(qk=(0.0, 0.7), vo=(0.0, -0.4))
STORAGE = ("layers", "fused", "own", "turned", "conv")


class Head(nn.Module):
    """One head: (k, d) maps for queries, keys and values, kept in one of several ways."""

    def __init__(self, storage: str, size: int, order: str, bias: bool, causal: bool) -> None:
        super().__init__()
        self.storage, self.order, self.size, self.causal = storage, order, size, causal
        if storage == "layers":
            self.a, self.e, self.c = (nn.Linear(DIM, size, bias=bias) for _ in range(3))
        elif storage == "fused":
            self.all = nn.Linear(DIM, 3 * size, bias=bias)
        elif storage == "conv":
            self.a, self.e, self.c = (nn.Conv1d(DIM, size, 1, bias=bias) for _ in range(3))
        else:
            shape = (DIM, size) if storage == "own" else (size, DIM)
            self.a, self.e, self.c = (nn.Parameter(torch.randn(shape) * DIM**-0.5) for _ in range(3))

    def weights(self) -> dict[str, Tensor]:
        """Return what stands for q, k and v as (k, d)."""
        if self.storage == "fused":
            return dict(zip(self.order, self.all.weight.chunk(3), strict=True))
        parts: list[Any] = [self.a, self.e, self.c]
        parts = [part if isinstance(part, Tensor) else part.weight.flatten(1) for part in parts]
        return dict(zip(self.order, [part.mT if self.storage == "own" else part for part in parts], strict=True))

    def biases(self) -> dict[str, Any]:
        if self.storage == "fused":
            bias = self.all.bias
            return dict(zip(self.order, [None] * 3 if bias is None else bias.chunk(3), strict=True))
        found = [getattr(part, "bias", None) for part in (self.a, self.e, self.c)]
        return dict(zip(self.order, found, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        weights, biases = self.weights(), self.biases()
        q, k, v = (F.linear(x, weights[part], biases[part]) for part in "qkv")
        scores = q @ k.mT / self.size**0.5
        if self.causal:
            scores = scores.masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), float("-inf"))
        return scores.softmax(-1) @ v


class Heads(nn.Module):
    """Heads that are concatenated and projected, or combined in ways whose products are others."""

    def __init__(self, twist: str, storage: str, heads: int, order: str, bias: bool, causal: bool, held: str) -> None:
        super().__init__()
        self.twist = twist
        parts = [Head(storage, DIM // heads, order, bias, causal) for _ in range(heads)]
        if held == "list":
            self.parts = nn.ModuleList(parts)
        else:
            for place, part in enumerate(parts):
                self.add_module(f"part_{place}", part)
        self.mix = nn.Sequential(nn.Linear(DIM, DIM, bias=bias), nn.Dropout(0.1))

    def heads(self) -> list[Head]:
        return [part for part in self.modules() if isinstance(part, Head)]

    def forward(self, x: Tensor) -> Tensor:
        heads = self.heads()
        if self.twist == "reversed":  # the last head first: the output's columns are in the other order
            heads = heads[::-1]
        if self.twist == "in turn":  # each sees what the one before it gave
            outs = [heads[0](x)]
            for head in heads[1:]:
                outs.append(head(x + F.pad(outs[-1], (0, DIM - outs[-1].shape[-1]))))
        elif self.twist == "shifted":
            outs = [head(x.roll(place, 1)) for place, head in enumerate(heads)]
        elif self.twist == "negated":
            outs = [-head(x) for head in heads]
        elif self.twist == "interleaved":
            return self.mix(torch.stack([head(x) for head in heads], -1).flatten(-2))
        else:
            outs = [head(x) for head in heads]
        return self.mix(torch.cat(outs, -1))


class Model(nn.Module):
    """Two layers on token ids."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.embed, self.norm, self.layers = nn.Embedding(40, DIM), nn.LayerNorm(DIM), nn.ModuleList(layers)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(self.norm(x))
        return x


kinds = st.fixed_dictionaries(
    {
        "twist": st.sampled_from(("", "", "", "reversed", "in turn", "shifted", "negated", "interleaved")),
        "storage": st.sampled_from(STORAGE),
        "heads": st.sampled_from([2, 3, 4]),
        "order": st.sampled_from(["qkv", "kqv", "vkq"]),
        "bias": st.booleans(),
        "causal": st.booleans(),
        "held": st.sampled_from(["list", "names"]),
    }
)


def shown(layer: Heads) -> tuple[float, float]:
    """Return the mean diagonals of W_Q W_Kᵀ over heads, from what forward takes, and of W_V W_out, from its output."""
    pairs = [{part: weight.detach() for part, weight in head.weights().items()} for head in layer.heads()]
    qk = torch.stack([(pair["q"].mT @ pair["k"]).diagonal().mean() for pair in pairs]).mean()
    still = copy.deepcopy(layer).double().eval()
    for name, parameter in still.named_parameters():
        if "bias" in name:
            parameter.data.zero_()
    # A sequence of one token hands its value on.
    with torch.no_grad():
        vo = still(torch.eye(DIM, dtype=torch.float64)[:, None])[:, 0].diagonal().mean()
    return float(qk), float(vo)


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(kind=kinds, wrapped=st.booleans())
def test_heads_of_their_own_are_right_by_a_forward_pass_or_left_alone(kind: dict[str, Any], wrapped: bool) -> None:
    layer = Heads(**kind)
    model = Model(layer) if wrapped else layer
    before = copy.deepcopy(model.state_dict())
    try:
        [row] = espalier.structure_(model, attention=SPEC, generator=torch.Generator().manual_seed(0)).layers
    except EspalierError:
        assert kind["twist"], kind
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        return
    assert row.status == "written"
    assert not kind["twist"], kind
    qk, vo = shown(layer)
    assert qk == pytest.approx(row.measured["qk_diagonal"], abs=1e-4)
    assert vo == pytest.approx(row.measured["vo_diagonal"], abs=1e-4)
    assert qk > 0.05
    assert vo < -0.05


class Lists(nn.Module):
    """Lists of queries, and of keys and values or one of each for all heads."""

    def __init__(self, heads: int, shared: bool) -> None:
        super().__init__()
        size, groups = DIM // heads, 1 if shared else heads
        self.first = nn.ModuleList(nn.Linear(DIM, size) for _ in range(heads))
        self.second = nn.ModuleList(nn.Linear(DIM, size) for _ in range(groups))
        self.third = nn.ModuleList(nn.Linear(DIM, size) for _ in range(groups))
        self.last = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        outs = []
        for place, to_q in enumerate(self.first):
            place %= len(self.second)
            outs.append(F.scaled_dot_product_attention(to_q(x), self.second[place](x), self.third[place](x)))
        return self.last(torch.cat(outs, -1))


@pytest.mark.parametrize(("heads", "shared"), [(3, False), (4, True)])
def test_lists_of_maps_are_heads(heads: int, shared: bool) -> None:
    layer = Lists(heads, shared)
    [row] = espalier.structure_(layer, attention=SPEC, generator=torch.Generator().manual_seed(0)).layers
    assert row.status == "written"
    k = [part.weight.detach() for part in layer.second] * (heads if shared else 1)
    qk = torch.stack([(q.weight.detach().mT @ w).diagonal().mean() for q, w in zip(layer.first, k, strict=True)]).mean()
    assert float(qk) == pytest.approx(row.measured["qk_diagonal"], abs=1e-5)
    with torch.no_grad():
        for part in (*layer.third, layer.last):
            part.bias.zero_()
        vo = layer(torch.eye(DIM)[:, None])[:, 0].diagonal().mean()
    assert float(vo) == pytest.approx(row.measured["vo_diagonal"], abs=1e-5)


def make(held: str = "list", storage: str = "layers") -> Heads:
    return Heads("", storage, 3, "kqv", bias=False, causal=True, held=held)


def test_a_guarded_report_knows_touched_heads() -> None:
    model = Model(make(), make())
    own = dict(model.named_parameters())
    report = espalier.structure_(model, attention=SPEC, guard=True)
    assert [row.status for row in report.layers] == ["written"] * 2
    assert all(parameter is own[name] and parameter.requires_grad for name, parameter in model.named_parameters())
    assert {parameter.untyped_storage().nbytes() for parameter in own.values() if parameter.shape == (8, DIM)} == {
        8 * DIM * 4
    }
    assert [row.status for row in espalier.audit(model, against=report).layers] == ["present"] * 2
    with torch.no_grad():
        model.layers[1].heads()[2].a.weight.mul_(1.01)
    assert [row.status for row in espalier.audit(model, against=report).layers] == ["present", "changed"]


def test_what_fails_inside_leaves_heads_as_they_were() -> None:
    model = Model(make())
    before = copy.deepcopy(model.state_dict())
    [layer] = espalier.init.layouts.locate_layers(model)

    def fail() -> None:
        with layer.open() as weights:
            assert isinstance(weights, AttentionWeights)
            weights.q.zero_()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with layer.open() as weights:
        weights.q.zero_()
    assert all(not head.weights()["q"].any() for head in model.layers[0].heads())


def test_frozen_tied_and_bare_heads_are_left_alone() -> None:
    model = Model(make(), make())
    model.layers[0].heads()[1].a.weight.requires_grad_(False)
    rows = espalier.structure_(model, attention=SPEC).layers
    assert [row.status for row in rows] == ["skipped", "written"]
    assert "frozen" in rows[0].note
    model = Model(make(), make())
    model.layers[1].parts[0].c.weight = model.layers[0].parts[0].c.weight
    rows = espalier.structure_(model, attention=SPEC).layers
    assert [row.status for row in rows] == ["written", "skipped"]
    meta = copy.deepcopy(Model(make())).to("meta")
    [row] = espalier.structure_(meta, attention=SPEC).layers
    assert row.status == "skipped"
    assert "meta" in row.note


def test_heads_of_their_own_can_be_found_and_fitted_in_half_precision() -> None:
    model = Model(make("names", "fused")).to(torch.bfloat16)
    espalier.structure_(model, attention=SPEC)
    [(name, _, weights)] = find_layers(model)
    assert (name, weights.kind) == ("layers.0", "attention")
    [fitted] = espalier.init.fit(model).rows["attention"]
    assert fitted.vo[1] == pytest.approx(-0.4, abs=0.02)
