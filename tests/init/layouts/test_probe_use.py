"""Keys and values of other tokens are seen in a run of whoever calls the layer, however they get there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import espalier
from espalier.errors import EspalierError
from espalier.init.layouts import Skipped, find_layers

DIM, HEADS, WIDE = 24, 4, 40
Kept = Tensor | None


class Attention(nn.Module):
    """Attention that takes keys and values from its own tokens unless it is given others in one of many ways."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.kept = HEADS, None
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM, bias=False), nn.Linear(DIM, DIM, bias=False)
        self.narrow = nn.Linear(WIDE, DIM)

    def attend(self, x: Tensor, keys: Kept = None, values: Kept = None) -> Tensor:
        sources = (x, x if keys is None else keys, x if values is None else values)
        parts = (self.qkv(source).chunk(3, -1)[place] for place, source in enumerate(sources))
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x, self.kept, self.kept)


class AnyName(Attention):
    def forward(self, x: Tensor, w: Any = None) -> Tensor:
        return self.attend(x, w, w)


class Values(Attention):
    def forward(self, x: Tensor, w: Kept = None) -> Tensor:
        return self.attend(x, None, w)


class Three(Attention):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.attend(query, key, value)


class Listed(Attention):
    def forward(self, x: Tensor, held: dict[str, Kept] | None = None) -> Tensor:
        return self.attend(x, (held or {}).get("keys"), (held or {}).get("keys"))


class Flagged(Attention):
    def forward(self, x: Tensor, w: Any = False) -> Tensor:
        return self.attend(x) if w is False else self.attend(x, w, w)


class Paired(Attention):
    def forward(self, inputs: Any) -> Tensor:
        x, w = inputs if isinstance(inputs, tuple) else (inputs, None)
        return self.attend(x, w, w)


class Wide(Attention):
    def forward(self, x: Tensor, context: Kept = None) -> Tensor:
        context = None if context is None else self.narrow(context)
        return self.attend(x, context, context)


def kept_before(layer: Attention, x: Tensor, other: Kept) -> Tensor:
    layer.kept = other
    out: Tensor = layer(x)
    layer.kept = None
    return out


def or_own(x: Tensor, other: Kept) -> Tensor:
    return x if other is None else other


WAYS: dict[str, tuple[type[Attention], Callable[[Any, Tensor, Kept], Tensor]]] = {
    "an argument of any type": (AnyName, lambda layer, x, other: layer(x, other)),
    "values alone": (Values, lambda layer, x, other: layer(x, other)),
    "the third of three": (Three, lambda layer, x, other: layer(x, x, or_own(x, other))),
    "a dictionary": (Listed, lambda layer, x, other: layer(x, {"keys": other})),
    "a default that is no None": (Flagged, lambda layer, x, other: layer(x, False if other is None else other)),
    "a tuple": (Paired, lambda layer, x, other: layer((x, other))),
    "an attribute": (Attention, kept_before),
    "twice": (AnyName, lambda layer, x, other: layer(x) + layer(x, other)),
}


class Block(nn.Module):
    """Calls a layer with its own tokens, or with others: its own in another order, half of them, learned, given."""

    def __init__(self, layer: nn.Module, call: Callable[..., Tensor], kind: str, width: int = DIM) -> None:
        super().__init__()
        self.attn, self.call, self.kind, self.norm = layer, call, kind, nn.LayerNorm(DIM)
        self.learned, self.of_given = nn.Parameter(torch.randn(1, 64, DIM)), nn.LayerNorm(width)
        self.made = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, context: Kept = None) -> Tensor:
        kinds: dict[str, Kept] = {
            "own": None,
            "order": self.norm(x).flip(1),
            "learned": self.learned[:, : x.shape[1]].expand(len(x), -1, -1),
            "made": self.made(x),
            "given": None if context is None else self.of_given(context),
        }
        out: Tensor = self.call(self.attn, self.norm(x), kinds[self.kind])
        return x + out


def found_in(model: nn.Module) -> Any:
    [found] = [found for name, _, found in find_layers(model) if name.endswith("attn")]
    return found


@pytest.mark.parametrize("way", WAYS)
def test_other_tokens_are_seen_however_they_reach_the_layer(way: str) -> None:
    make, call = WAYS[way]
    assert not isinstance(found_in(nn.ModuleList([Block(make(), call, "own")])), Skipped)
    # An order of the same tokens shows in keys alone, and in the first call of a layer.
    for kind in (
        "learned",
        "made",
        "given",
        *(("order",) if way not in ("values alone", "twice", "the third of three") else ()),
    ):
        found = found_in(nn.ModuleList([Block(make(), call, kind)]))
        assert isinstance(found, Skipped), kind
        assert "cross-attention" in found.reason


def test_a_second_sequence_of_another_width_is_made_up_too() -> None:
    for kind in ("own", "given"):
        found = found_in(nn.ModuleList([Block(Wide(), lambda layer, x, other: layer(x, other), kind, WIDE)]))
        assert isinstance(found, Skipped) == (kind == "given")


def test_a_layer_of_two_blocks_is_asked_about_in_both() -> None:
    layer = AnyName()
    own = Block(layer, lambda layer, x, _: layer(x), "own")
    for kind in ("own", "made"):
        model = nn.ModuleList([own, Block(layer, lambda layer, x, other: layer(x, other), kind)])
        assert isinstance(found_in(model), Skipped) == (kind == "made")


def mixed_up(layer: Attention, x: Tensor, _: Kept) -> Tensor:
    k, v, q = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in layer.qkv(x).chunk(3, -1))
    out: Tensor = layer.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    return out


@pytest.mark.parametrize("call", [mixed_up, lambda layer, x, other: layer.attend(x, other, other)])
def test_a_layer_whose_parts_are_taken_without_it_is_left_alone(call: Callable[..., Tensor]) -> None:
    found = found_in(nn.ModuleList([Block(Attention(), call, "own")]))
    assert isinstance(found, Skipped)
    assert "without calling it" in found.reason


def test_one_layer_that_fails_in_its_own_way_does_not_stop_the_others() -> None:
    class Odd(Attention):
        @property
        def num_heads(self) -> int:
            if self.kept is not None:
                raise KeyError("no heads")
            return HEADS

        @num_heads.setter
        def num_heads(self, _: int) -> None: ...

        def __deepcopy__(self, _: Any) -> Odd:
            twin = Odd()
            twin.kept = torch.zeros(1)
            return twin

    report = espalier.structure_(nn.ModuleList([Odd(), Attention()]), generator=torch.Generator().manual_seed(0))
    assert [row.status for row in report.layers] == ["skipped", "written"]
    with pytest.raises(EspalierError, match="no heads"):
        espalier.structure_(Odd())


def test_positions_that_are_added_to_queries_and_keys_alone_make_no_other_tokens() -> None:
    class Detr(Block):
        def forward(self, x: Tensor, query_pos: Tensor) -> Tensor:  # type: ignore[override]
            out: Tensor = self.attn(x + query_pos, x + query_pos, x)
            return x + out

    assert not isinstance(found_in(nn.ModuleList([Detr(Three(), or_own, "own")])), Skipped)


# What of x, learned positions p and other tokens queries, keys and values are made. Given the first three, a layer
# attends to its own tokens.
GIVEN: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]] = {
    "positions for queries and keys": lambda x, p, _: (x + p, x + p, x),
    "positions for keys": lambda x, p, _: (x, x + p, x),
    "positions of each": lambda x, p, _: (x + p, x + 2 * p, x),
    "learned keys": lambda x, p, _: (x, p, x),
    "learned keys and values": lambda x, p, _: (x + p, p, p),
    "the token before": lambda x, p, _: (x + p, x.roll(1, 1) + p, x),
    "other values": lambda x, p, other: (x + p, x + p, other + p),
    "other tokens besides": lambda x, p, other: (x + p, x + other, x),
    "a multiple": lambda x, p, _: (x + p, 2 * x + p, x),
}


class Placed(nn.Module):
    """Hands a layer what ``GIVEN`` says."""

    def __init__(self, layer: nn.Module, how: str, of_ids: bool) -> None:
        super().__init__()
        self.attn, self.how, self.table = layer, how, nn.Embedding(50, DIM) if of_ids else None
        self.positions, self.made = nn.Parameter(torch.randn(1, 512, DIM)), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.table is None else self.table(x)
        given = GIVEN[self.how](x, self.positions[:, : x.shape[1]].expand_as(x), self.made(x))
        out = self.attn(*given)
        return x + (out[0] if isinstance(out, tuple) else out)


@pytest.mark.parametrize("of_ids", [False, True])
@pytest.mark.parametrize("make", [Three, lambda: nn.MultiheadAttention(DIM, HEADS, batch_first=True)])
@pytest.mark.parametrize("how", GIVEN)
def test_positions_added_within_the_block_make_no_other_tokens(
    how: str, make: Callable[[], nn.Module], of_ids: bool
) -> None:
    own = how in list(GIVEN)[:3]
    found = found_in(nn.Sequential(Placed(make(), how, of_ids)))
    if not (of_ids and own):  # a block on token ids is run only as a model
        assert isinstance(found, Skipped) != own


class Remembering(nn.Module):
    """Keys and values that are parameters, before or after those of the tokens, or another sequence's."""

    def __init__(self, extra: int, place: str) -> None:
        super().__init__()
        self.num_heads, self.place = 3, place
        self.memory, self.gain = nn.Parameter(torch.randn(2, 3, extra, 8)), nn.Parameter(torch.ones(1, 1, 24))
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(24, 24) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.gain
        tokens = torch.cat((x.mean(1, keepdim=True), x, x[:, :1]), 1) if self.place == "tokens" else x
        parts = zip((self.q_proj, self.k_proj, self.v_proj), (x, tokens, tokens), strict=True)
        q, k, v = (layer(given).unflatten(-1, (3, -1)).transpose(1, 2) for layer, given in parts)
        if self.place != "tokens":
            more = (part.expand(len(x), -1, -1, -1) for part in self.memory)
            pairs = (((m, t) if self.place == "before" else (t, m)) for m, t in zip(more, (k, v), strict=True))
            k, v = (torch.cat(pair, 2) for pair in pairs)
        return self.o_proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("extra", [1, 4])
@pytest.mark.parametrize("place", ["before", "after", "tokens"])
def test_keys_that_are_parameters_stand_beside_those_of_tokens(place: str, extra: int, inside: bool) -> None:
    layer = Remembering(extra, place)
    model = nn.Sequential(nn.Embedding(30, 24), layer) if inside else layer
    before = layer.memory.detach().clone()
    [(_, _, found)] = find_layers(model)
    assert isinstance(found, Skipped) == (place == "tokens")
    assert torch.equal(layer.memory, before)
