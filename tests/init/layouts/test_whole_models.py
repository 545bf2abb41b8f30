"""Attention that a model calls itself, on token ids, images or features: proven where its own, left alone where not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

import espalier
from espalier.init.layouts import Skipped, find_layers

DIM, HEADS, WORDS = 32, 4, 50


class Tokens(nn.Module):
    """Token ids in, logits out, with one layer of torch's that it calls itself; ``keys`` says whose keys it gets."""

    def __init__(self, keys: Callable[[Tensor], Tensor] = lambda x: x, *, batch_first: bool = True) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(WORDS, DIM), nn.Embedding(64, DIM)
        self.attn = nn.MultiheadAttention(DIM, HEADS, batch_first=batch_first)
        self.head, self.keys, self.axis = nn.Linear(DIM, WORDS), keys, int(batch_first)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        place = self.places(torch.arange(ids.shape[self.axis]))
        x = x + (place if self.axis else place[:, None])
        y = self.keys(x)
        return self.head(x + self.attn(x, y, y, need_weights=False)[0])


class Context(Tokens):
    """Its keys are those of another text where there is one."""

    def forward(self, ids: Tensor, context_ids: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        y = x if context_ids is None else self.embed(context_ids)
        return self.head(x + self.attn(x, y, y)[0])


class TwoTexts(Tokens):
    def forward(self, ids: Tensor, other_ids: Tensor) -> Tensor:
        x, y = self.embed(ids), self.embed(other_ids)
        return self.head(x + self.attn(x, y, y)[0])


class Whole(Tokens):
    """Its table of positions is added whole, so that texts of one length fit."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.randn(1, 24, DIM))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.pos_embed
        return self.head(self.attn(x, x, x)[0])


class Image(nn.Module):
    def __init__(self, others: str = "") -> None:
        super().__init__()
        self.stem, self.others = nn.Conv2d(3, DIM, 8, 8), others
        self.attn, self.head = nn.MultiheadAttention(DIM, HEADS, batch_first=True), nn.Linear(DIM, 10)

    def forward(self, image: Tensor, reference: Tensor | None = None) -> Tensor:
        x = self.stem(image).flatten(2).mT
        y = x if reference is None or not self.others else self.stem(reference).flatten(2).mT
        return self.head(self.attn(x, y, y)[0].mean(1))


class Graph(nn.Module):
    """Features of nodes, and which of them are neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.attn = nn.Linear(7, DIM), nn.MultiheadAttention(DIM, HEADS, batch_first=True)

    def forward(self, nodes: Tensor, adjacency: Tensor) -> Tensor:
        x = self.inputs(nodes)
        return x + self.attn(x, x, x, attn_mask=~adjacency)[0]


class Diffusion(nn.Module):
    """One head over the pixels of a map, as in many a U-Net, and a time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.time, self.last = nn.Conv2d(3, DIM, 3, padding=1), nn.Linear(1, DIM), nn.Conv2d(DIM, 3, 3)
        self.attend = Pixels()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.first(x) + self.time(t[:, None])[..., None, None]
        return self.last(self.attend(x))


class Pixels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, DIM)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(DIM, DIM, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))
        maps = (q.mT @ k / DIM**0.5).softmax(-1)
        return x + self.proj_out((v @ maps.mT).view_as(x))


class Own(nn.Module):
    """One head without a name for their number, in the model itself."""

    def __init__(self, change: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.embed, self.change = nn.Embedding(WORDS, DIM), change
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM) for _ in range(4))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        y = self.change(x)
        return self.o((self.q(x) @ self.k(y).mT / DIM**0.5).softmax(-1) @ self.v(y))


@pytest.mark.parametrize(
    "make", [Tokens, lambda: Tokens(batch_first=False), Whole, Image, lambda: Image(""), Graph, Diffusion, Own]
)
def test_attention_that_a_model_calls_itself_is_written(make: Callable[[], nn.Module]) -> None:
    model = make()
    report = espalier.structure_(model, generator=torch.Generator().manual_seed(0), depthwise=None)
    assert [row.status for row in report.layers] == ["written"]
    assert espalier.audit(model, against=report).ok


def mean(x: Tensor) -> Tensor:
    """The mean of all tokens of a text, in every place; over one token it is that token."""
    return x.mean(0, keepdim=True).expand_as(x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Tokens(lambda x: x.flip(1)),
        lambda: Tokens(lambda x: x.roll(1, 1)),
        lambda: Tokens(lambda x: x.mean(1, keepdim=True).expand_as(x)),
        lambda: Tokens(lambda x: x[:, ::2]),
        lambda: Tokens(mean, batch_first=False),
        Context,
        TwoTexts,
        lambda: Image("taken"),
        lambda: Own(lambda x: x.flip(1)),
        lambda: Own(lambda x: x.cumsum(1)),
    ],
)
def test_other_keys_are_seen_in_a_model_that_calls_attention_itself(make: Callable[[], nn.Module]) -> None:
    [(_, _, found)] = find_layers(make())
    assert isinstance(found, Skipped), found


class Handed(nn.Module):
    """A model on token ids that hands its attention keys; ``optional`` ones, or such as it cannot do without."""

    def __init__(self, keys: Callable[[Tensor], Tensor], *, optional: bool, named: bool) -> None:
        super().__init__()
        self.embed, self.keys = nn.Embedding(WORDS, DIM), keys
        self.mix = (KeysOrOwn if optional else Keys)(named)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return x + self.mix(x, self.keys(x))


class Keys(nn.Module):
    def __init__(self, named: bool) -> None:
        super().__init__()
        self.names = ("q_proj", "k_proj", "v_proj", "o_proj") if named else ("c", "a", "d", "b")
        for name in self.names:
            self.add_module(name, nn.Linear(DIM, DIM))
        if named:
            self.num_heads = HEADS

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        maps = [self.get_submodule(name) for name in self.names]
        parts = zip(maps[:3], (x, y, y), strict=True)
        q, k, v = (layer(given).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer, given in parts)
        mixed = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        return maps[3](mixed.transpose(1, 2).flatten(2))


class KeysOrOwn(Keys):
    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return super().forward(x, x if y is None else y)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize(
    ("keys", "own"),
    [
        (lambda x: x, True),
        (lambda x: 2 * x, True),
        (lambda x: -x, False),
        (lambda x: x.flip(1), False),
        (lambda x: x.roll(1, 1), False),
        (lambda x: x.cumsum(1), False),
    ],
)
def test_keys_that_a_model_on_ids_hands_over(
    keys: Callable[[Tensor], Tensor], own: bool, optional: bool, named: bool
) -> None:
    found = [weights for _, _, weights in find_layers(Handed(keys, optional=optional, named=named))]
    assert [not isinstance(weights, Skipped) for weights in found] in ([[True]] if own else [[False], []])


class Pooled(nn.Module):
    """An encoder, and four maps of the model's own that pool what comes of it."""

    def __init__(self, heads: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(DIM, HEADS, 2 * DIM, batch_first=True)
        self.inputs, self.encoder = nn.Linear(5, DIM), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.query, self.key, self.value, self.out = (nn.Linear(DIM, DIM) for _ in range(4))
        if heads:
            self.num_heads = 1

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(self.inputs(x))
        maps = (self.query(x[:, :1]) @ self.key(x).mT / DIM**0.5).softmax(-1)
        return self.out(maps @ self.value(x))


@pytest.mark.parametrize("heads", [True, False])
def test_attention_inside_a_module_that_reads_as_attention_has_rows_of_its_own(heads: bool) -> None:
    rows = {row.layer: row.status for row in espalier.structure_(Pooled(heads)).layers}
    assert rows == {"": "skipped", "encoder.layers.0.self_attn": "written", "encoder.layers.1.self_attn": "written"}


class ByName(nn.Module):
    """A model that takes one batch by names."""

    def __init__(self, kind: str, keys: str) -> None:
        super().__init__()
        self.kind, self.keys = kind, keys
        self.inputs = {"ids": nn.Embedding(40, DIM), "image": nn.Conv2d(3, DIM, 4, 4), "features": nn.Linear(5, DIM)}[
            kind
        ]
        self.attn, self.out = nn.MultiheadAttention(DIM, HEADS, batch_first=True), nn.Linear(DIM, 3)

    def embed(self, value: Tensor) -> Tensor:
        x = self.inputs(value)
        return x.flatten(2).mT if x.ndim == 4 else x

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        x = y = self.embed(batch[self.kind])
        mask = ~batch["attention_mask"].bool() if self.keys == "masked" else None
        if self.keys == "other":
            y = self.embed(batch["context"])
        elif self.keys in ("get", "pop") and (other := getattr(batch, self.keys)("context", None)) is not None:
            y = self.embed(other)
        elif self.keys == "asked" and "context" in batch:
            y = self.embed(batch["context"])
        scores = self.out((x + self.attn(x, y, y, key_padding_mask=mask)[0]).mean(1))
        labels = batch.get("labels")
        return scores, None if labels is None else nn.functional.cross_entropy(scores, labels)


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        *((kind, keys) for kind in ("ids", "image", "features") for keys in ("own", "other", "get", "pop", "asked")),
        ("ids", "masked"),
        ("features", "masked"),
    ],
)
def test_a_batch_by_names_is_made_of_what_a_model_asks_for(kind: str, keys: str) -> None:
    [(_, _, found)] = find_layers(ByName(kind, keys))
    assert isinstance(found, Skipped) == (keys not in ("own", "masked"))


class Turned(nn.Module):
    """Rotary tables in arguments whose names say nothing: zeros in their place would leave no score."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(DIM, DIM) for _ in range(4))

    def forward(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.wq, self.wk, self.wv))
        a, b = (part.view(1, 1, x.shape[1], -1) for part in (a, b))
        halves = (t.chunk(2, -1) for t in (q, k))
        q, k = (torch.cat((one * a - two * b, one * b + two * a), -1) for one, two in halves)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(mixed.transpose(1, 2).flatten(2))


class Untold(nn.Module):
    """Attention whose owner calls its forward alone, which runs no hook."""

    def __init__(self, keys: str) -> None:
        super().__init__()
        self.keys, self.norm = keys, nn.LayerNorm(DIM)
        self.attention = Keys(named=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.attention.forward(y, y if self.keys == "own" else y.flip(1))


class OnIds(nn.Module):
    """A model on token ids, its block, and a table of angles."""

    def __init__(self, block: nn.Module, *, table: bool) -> None:
        super().__init__()
        self.embed, self.block, self.table = nn.Embedding(40, DIM), block, table
        self.register_buffer("angles", torch.outer(torch.arange(32.0), torch.tensor([0.3])))

    def forward(self, ids: Tensor) -> Tensor:
        angles = self.angles[: ids.shape[1]]
        return self.block(self.embed(ids), *((angles.cos(), angles.sin()) if self.table else ()))


def test_arguments_without_a_meaning_are_those_of_the_model_s_run() -> None:
    [(_, _, found)] = find_layers(OnIds(Turned(), table=True))
    assert not isinstance(found, Skipped)


@pytest.mark.parametrize("keys", ["own", "other"])
def test_a_forward_that_is_called_alone_is_seen(keys: str) -> None:
    [(_, _, found)] = find_layers(OnIds(Untold(keys), table=False))
    assert isinstance(found, Skipped) == (keys == "other")


class Timed(nn.Module):
    """A model that computes with a time in float32, whatever the type of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.time = nn.Conv2d(3, DIM, 4, 4), nn.Linear(4, DIM)
        self.attn, self.out = nn.MultiheadAttention(DIM, HEADS, batch_first=True), nn.Linear(DIM, 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        waves = t.float()[:, None] * torch.arange(4, dtype=torch.float32)
        y = self.inputs(x).flatten(2).mT + self.time(waves.sin().to(torch.float32))[:, None]
        return self.out(y + self.attn(y, y, y)[0])


def test_float32_in_a_forward_pass_meets_no_other_type() -> None:
    [(_, _, found)] = find_layers(Timed())
    assert not isinstance(found, Skipped)


class Flexible(nn.Module):
    """Flex attention, causal or of values in the wrong order."""

    def __init__(self, *, causal: bool, wrong: bool) -> None:
        super().__init__()
        self.num_heads, self.causal, self.wrong = HEADS, causal, wrong
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        v = v.flip(1) if self.wrong else v

        def later(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return torch.where(i >= j, score, -float("inf"))

        mixed = flex_attention(q, k, v, score_mod=later if self.causal else None)
        return self.proj(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("wrong", [False, True])
def test_flex_attention_is_watched(causal: bool, wrong: bool) -> None:
    [(_, _, found)] = find_layers(nn.Sequential(Flexible(causal=causal, wrong=wrong)))
    assert isinstance(found, Skipped) == wrong
