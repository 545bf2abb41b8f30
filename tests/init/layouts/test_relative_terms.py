"""Attention whose scores have terms of queries or of keys alone: relative positions, in their usual forms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import espalier
from espalier.init.layouts import AttentionWeights, find_layers

DIM, HEADS = 24, 3
SPEC = espalier.Mimetic(qk=(0.0, 0.7), vo=(0.0, -0.4))


class Relative(nn.Module):
    """Self-attention with relative positions, or with a fault beside them.

    Ways: q·r(i − j) of the Music Transformer, Shaw's with v + r; that and k·r; (q + u)·k + (q + w)·r of Transformer-XL;
    rows and columns of an image apart, as SAM has them.
    """

    def __init__(self, way: str, fault: str = "", seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.num_heads, self.way, self.fault, size = HEADS, way, fault, DIM // HEADS
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(DIM, DIM) for _ in range(4))
        self.distances, self.added = nn.Embedding(2 * DIM, size), nn.Parameter(torch.randn(DIM, DIM) / DIM**0.5)
        self.content_bias, self.position_bias = (
            nn.Parameter(torch.randn(HEADS, 1, size)),
            nn.Parameter(torch.randn(size)),
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.maps())
        more = (x @ self.added.mT).unflatten(-1, (HEADS, -1)).transpose(1, 2)  # as an adapter adds it
        q, k, v = (
            part + more * (self.fault == f"added to {name}") for name, part in zip("qkv", (q, k, v), strict=True)
        )
        if self.fault == "squares":  # half of a head's queries meet queries
            half = q.shape[-1] // 2
            k = torch.cat([q[..., half:].roll(1, -1), k[..., half:]], -1)
        if self.fault == "shifted":
            k = k.roll(1, 2)
        if self.fault == "turned":
            k = k * torch.tensor([1.0, -1.0, 1.0], dtype=x.dtype)[:, None, None]
        scores = (q @ k.mT + self.terms(q, k)) / q.shape[-1] ** 0.5
        if self.fault == "mirrored":
            v = torch.cat([v[:, :1], v[:, 1:].flip(-1)], 1)
        weights = scores.softmax(-1)
        mixed = weights @ v
        if self.way == "values":
            mixed = mixed + torch.einsum("bhij,ijk->bhik", weights, self.relative(x.shape[1]))
        return self.out_proj(mixed.transpose(1, 2).flatten(2))

    def maps(self) -> tuple[nn.Module, ...]:
        swapped = self.fault == "gate"  # what is read as values is keys
        return (self.q_proj, self.v_proj, self.k_proj) if swapped else (self.q_proj, self.k_proj, self.v_proj)

    def relative(self, length: int) -> Tensor:
        places = torch.arange(length)
        found: Tensor = self.distances(places[:, None] - places + DIM)
        return found

    def terms(self, q: Tensor, k: Tensor) -> Tensor:
        r_LLK = self.relative(q.shape[2])
        of_q = torch.einsum("bhik,ijk->bhij", q, r_LLK)
        if self.way == "both":
            return of_q + torch.einsum("bhjk,ijk->bhij", k, r_LLK)
        if self.way == "xl":
            of_places = torch.einsum("k,ijk->ij", self.position_bias, r_LLK)
            return of_q + self.content_bias @ k.mT + of_places
        return of_q + of_q.roll(1, -1) if self.way == "axes" else of_q


WAYS = ("keys", "both", "xl", "axes", "values")
FAULTS = ("squares", "shifted", "turned", "gate", "mirrored", "added to q", "added to k", "added to v")


@pytest.mark.parametrize("way", WAYS)
def test_what_is_written_is_the_product_of_content(way: str) -> None:
    module = Relative(way).double()
    [row] = espalier.structure_(module, attention=SPEC, generator=torch.Generator().manual_seed(0)).layers
    assert row.status == "written"
    assert "terms of queries or keys alone" in row.note
    # Of unit tokens, the queries' product with the keys is W_Q W_Kᵀ.
    module.terms = lambda q, k: kept.append(q @ k.mT) or 0.0  # type: ignore[assignment,func-returns-value,return-value]
    kept: list[Tensor] = []
    with torch.no_grad():
        module(torch.eye(DIM, dtype=torch.float64)[None])
    assert kept[0][0].diagonal(0, 1, 2).mean().item() == pytest.approx(row.measured["qk_diagonal"], abs=1e-6)
    assert row.measured["qk_diagonal"] > 0.05


@settings(max_examples=30, deadline=None)
@given(
    way=st.sampled_from(WAYS),
    fault=st.sampled_from(FAULTS),
    seed=st.integers(0, 99),
)
def test_no_term_hides_a_fault(way: str, fault: str, seed: int) -> None:
    module = Relative(way, fault, seed)
    found = [part for _, _, part in find_layers(module) if isinstance(part, AttentionWeights)]
    if fault != "gate":
        assert not found
    # Names that mislead may be found out by what the maps move, and then the right rows are read.
    assert all(part.k.data_ptr() == module.v_proj.weight.data_ptr() for part in found)


class Adapted(nn.Linear):
    """A linear layer with a product of low rank beside its own, under names that no library gives it."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width)
        self.down, self.up = nn.Parameter(torch.randn(2, width)), nn.Parameter(torch.randn(width, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down.mT @ self.up.mT


class Plain(Relative):
    def terms(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.zeros(())


@pytest.mark.parametrize("adapted", ["q_proj", "k_proj", "v_proj", "out_proj", "q_proj v_proj", "q_proj k_proj"])
@pytest.mark.parametrize("relative", [False, True])
def test_rows_are_not_written_beside_an_adapter_of_any_name(adapted: str, relative: bool) -> None:
    module = Relative("xl") if relative else Plain("none")
    assert [part for _, _, part in find_layers(module) if isinstance(part, AttentionWeights)]
    for name in adapted.split():
        setattr(module, name, Adapted(DIM))
    assert not [part for _, _, part in find_layers(module) if isinstance(part, AttentionWeights)]


class Stabilised(Relative):
    """A sink a head, and the largest of each row taken off before the softmax, as GPT-OSS has it, or not."""

    def __init__(self, fault: str = "", stable: bool = True) -> None:
        super().__init__("none", fault)
        self.stable, self.sinks = stable, nn.Parameter(torch.randn(HEADS))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.maps())
        k = k.roll(1, 2) if self.fault == "shifted" else -k if self.fault == "turned" else k
        sinks = self.sinks[:, None, None].expand(len(x), -1, x.shape[1], 1)
        scores = torch.cat([q @ k.mT / q.shape[-1] ** 0.5, sinks], -1)
        largest = scores.amax(-1, keepdim=True) if self.stable else 0.0
        weights = (scores - largest).softmax(-1)[..., :-1]
        return self.out_proj((weights @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("stable", [True, False])
@pytest.mark.parametrize("fault", ["", "shifted", "turned"])
def test_the_largest_of_a_row_may_be_taken_off_it(fault: str, stable: bool) -> None:
    model = nn.Sequential(nn.LayerNorm(DIM), Stabilised(fault, stable))
    found = [part for _, _, part in find_layers(model) if isinstance(part, AttentionWeights)]
    assert len(found) == (not fault)


class Given(Relative):
    """Takes features of all distances between tokens, as Conformers do, or positions to add to queries and keys."""

    def __init__(self, way: str, fault: str = "") -> None:
        super().__init__(way, fault)
        self.pos_proj = nn.Linear(DIM, DIM, bias=False)

    def forward(self, x: Tensor, position_embeddings: Tensor | None = None) -> Tensor:
        assert position_embeddings is not None
        placed = x + position_embeddings if self.way == "added" else x
        maps = zip(self.maps(), (placed, placed, x), strict=True)
        q, k, v = (part(tokens).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part, tokens in maps)
        k = k.roll(1, 2) if self.fault == "shifted" else k
        scores = q @ k.mT
        if self.way == "distances":
            places = torch.arange(x.shape[1])
            r_HDK = self.pos_proj(position_embeddings[0]).unflatten(-1, (HEADS, -1)).transpose(0, 1)
            r_HLLK = r_HDK[:, places[:, None] - places + x.shape[1] - 1]
            assert position_embeddings.shape[1] == 2 * x.shape[1] - 1
            scores = scores + torch.einsum("bhik,hijk->bhij", q + self.position_bias, r_HLLK)
        return self.out_proj(((scores / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("fault", ["", "shifted"])
@pytest.mark.parametrize("way", ["distances", "added"])
def test_positions_that_are_given_are_made_up(way: str, fault: str) -> None:
    found = [part for _, _, part in find_layers(Given(way, fault)) if isinstance(part, AttentionWeights)]
    assert len(found) == (not fault)
