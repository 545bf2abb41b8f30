"""Attention as it is typed in published repositories: names, rotary tables, grids of tokens, one-tap convolutions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import espalier
from espalier.init.layouts import Skipped, find_layers
from reference.attention_probe import check_attention

DIM, HEADS = 24, 3
WIDTH = DIM // HEADS


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int = HEADS, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return mixed values (B, L, d) and maps of projections (B, L, d)."""
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    maps = (scores if bias is None else scores + bias).softmax(-1)
    return (maps @ v).transpose(1, 2).flatten(2), maps


class Listed(nn.Module):
    """The Annotated Transformer's: four layers in one list."""

    def __init__(self) -> None:
        super().__init__()
        self.h, self.linears = HEADS, nn.ModuleList([nn.Linear(DIM, DIM) for _ in range(4)])

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        mixed, maps = attend(*(layer(x) for layer, x in zip(self.linears, (query, key, value), strict=False)))
        return self.linears[-1](mixed), maps


class SelfLayer(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.self_attn = attention

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.self_attn(x, x, x)


def test_four_layers_in_one_list() -> None:
    layer = SelfLayer(Listed()).double()
    check_attention(layer, layer, DIM, HEADS)


class SequenceFirst(Listed):
    """ESM's: tokens before the batch; (1, L, d) is a batch of single tokens to it."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        assert query.ndim == 3
        out, maps = super().forward(query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1))
        return out.transpose(0, 1), maps


def test_sequences_before_the_batch() -> None:
    layer = SelfLayer(SequenceFirst()).double()

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        out, maps = layer(x.transpose(0, 1))
        return out.transpose(0, 1), maps

    check_attention(layer, run, DIM, HEADS)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (B, L, H, k) by tables that are broadcast to (…, k/2)."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


class Rotary(nn.Module):
    """Attention that is handed its rotary tables; subclasses say in which form."""

    def __init__(self) -> None:
        super().__init__()
        self.n_local_heads, self.head_dim = HEADS, WIDTH
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(DIM, DIM, bias=False) for _ in range(4))

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q, k = (turn(layer(x).unflatten(-1, (HEADS, -1)), cos, sin).flatten(2) for layer in (self.wq, self.wk))
        mixed, maps = attend(q, k, self.wv(x))
        return self.wo(mixed), maps


class Flat(Rotary):
    """llama2.c's tables: (L, k/2) each."""

    def forward(self, x: Tensor, freqs_cos: Tensor, freqs_sin: Tensor) -> tuple[Tensor, Tensor]:
        shape = 1, freqs_cos.shape[0], 1, freqs_cos.shape[1]
        return self.attend(x, freqs_cos.view(shape), freqs_sin.view(shape))


class Paired(Rotary):
    """nanochat's: a pair of (1, L, 1, k/2)."""

    def forward(self, x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        assert cos_sin[0].ndim == 4
        return self.attend(x, *cos_sin)


class Complex(Rotary):
    """Llama's: complex, (L, k/2)."""

    def forward(self, x: Tensor, start_pos: int, freqs_cis: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        assert freqs_cis.is_complex()
        table = freqs_cis.view(1, x.shape[1], 1, -1)
        return self.attend(x, table.real, table.imag)


@pytest.mark.parametrize("kind", [Flat, Paired, Complex])
def test_rotary_tables_in_the_forms_that_are_published(kind: type[Rotary]) -> None:
    module = kind().double()
    one, zero = torch.ones(DIM + 1, WIDTH // 2).double(), torch.zeros(DIM + 1, WIDTH // 2).double()
    tables = {
        Flat: lambda n: (one[:n], zero[:n]),
        Paired: lambda n: ((one[None, :n, None], zero[None, :n, None]),),
        Complex: lambda n: (0, torch.complex(one[:n], zero[:n]), None),
    }[kind]
    check_attention(module, lambda x: module(x, *tables(x.shape[1])), DIM, HEADS)


class Grid(nn.Module):
    """Segment Anything's: tokens in rows and columns, channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = HEADS, nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        batch, rows, columns, _ = x.shape
        mixed, maps = attend(*self.qkv(x.flatten(1, 2)).chunk(3, -1))
        return self.proj(mixed).view(batch, rows, columns, -1), maps


class Pixels(nn.Module):
    """Attention of an image, channels first, by convolutions of one tap; ``fused`` keeps each head's rows together."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.num_heads, self.fused = HEADS, fused
        if fused:
            self.qkv = nn.Conv1d(DIM, 3 * DIM, 1)
        else:
            self.q, self.k, self.v = (nn.Conv2d(DIM, DIM, 1) for _ in range(3))
        self.proj_out = nn.Conv2d(DIM, DIM, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.fused:
            by_head = self.qkv(x.flatten(2)).mT.unflatten(-1, (HEADS, 3, -1))
            parts = [part.flatten(2) for part in by_head.unbind(-2)]
        else:
            parts = [layer(x).flatten(2).mT for layer in (self.q, self.k, self.v)]
        mixed, maps = attend(*parts)
        return self.proj_out(mixed.mT.unflatten(-1, x.shape[2:])), maps


def test_tokens_in_rows_and_columns() -> None:
    module = Grid().double()

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        out, maps = module(x[:, None])
        return out[:, 0], maps

    check_attention(module, run, DIM, HEADS)


@pytest.mark.parametrize("fused", [False, True])
def test_convolutions_of_one_tap_are_projections_of_pixels(fused: bool) -> None:
    module = Pixels(fused).double()

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        out, maps = module(x.mT[..., None])
        return out[..., 0].mT, maps

    check_attention(module, run, DIM, HEADS)


class Signal(nn.Module):
    """Attention of a signal, channels first (VITS); ``h`` is no number of heads, but the width of one is known."""

    def __init__(self) -> None:
        super().__init__()
        self.d_k, self.h = WIDTH, 8
        self.conv_q, self.conv_k, self.conv_v, self.conv_o = (nn.Conv1d(DIM, DIM, 1) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert x.shape[1] == DIM
        mixed, maps = attend(*(layer(x).mT for layer in (self.conv_q, self.conv_k, self.conv_v)))
        return self.conv_o(mixed.mT), maps


def test_a_signal_with_its_channels_first() -> None:
    module = Signal().double()

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        out, maps = module(x.mT)
        return out.mT, maps

    check_attention(module, run, DIM, HEADS)


class Biased(nn.Module):
    """Attention with a bias of its sixteen positions, which takes no other number of tokens, and says so nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.to_qkv, self.to_out = HEADS, nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.table = nn.Parameter(torch.zeros(HEADS, 16, 16))

    def forward(self, x: Tensor, info: dict[str, Tensor]) -> Tensor:
        q, _, v = self.to_qkv(x).chunk(3, -1)
        _, k, _ = self.to_qkv(info["stream"]).chunk(3, -1)
        return self.to_out(attend(q, k, v, bias=self.table)[0])


class Model(nn.Module):
    """An image model whose second layer is handed other tokens than its own where ``crossed``."""

    def __init__(self, crossed: bool) -> None:
        super().__init__()
        self.stem, self.crossed = nn.Conv2d(3, DIM, 4, 4), crossed
        self.layers = nn.ModuleList([Biased(), Biased()])

    def forward(self, image: Tensor) -> Tensor:
        assert image.shape[2] >= 8
        x = self.stem(F.interpolate(image, (16, 16))).flatten(2).mT
        x = x + self.layers[0](x, {"stream": x})
        return x + self.layers[1](x, {"stream": x.flip(1) if self.crossed else x})


class MayTakeAnother(Model):
    """One that takes a second image, or tokens, for the keys of its second layer; or only says that it does."""

    def __init__(self, use: str) -> None:
        super().__init__(crossed=False)
        self.use = use

    def forward(self, image: Tensor, context: Tensor | None = None) -> Tensor:
        assert image.shape[2] >= 8
        x = self.stem(F.interpolate(image, (16, 16))).flatten(2).mT
        x = x + self.layers[0](x, {"stream": x})
        other = x
        if context is not None and self.use == "image":
            other = self.stem(F.interpolate(context, (16, 16))).flatten(2).mT
        elif context is not None and self.use == "tokens":
            other = context + torch.zeros_like(x)  # which fails on anything but tokens
        return x + self.layers[1](x, {"stream": other})


def test_a_layer_that_only_its_model_can_call_is_proven_in_a_run_of_the_model() -> None:
    model = Model(crossed=False).double()
    espalier.structure_(model, attention=espalier.Mimetic(qk=(0.0, 0.7), vo=(0.0, -0.4)), depthwise=None)
    tokens = torch.cat([torch.eye(DIM, dtype=torch.float64), torch.zeros(8, DIM, dtype=torch.float64)])
    for layer in model.layers:
        for bias in (layer.to_qkv.bias, layer.to_out.bias):
            nn.init.zeros_(bias)
        # One token in all places: its values come out as they are, through W_V W_out = −0.4 times the identity.
        each = torch.stack([layer(token.expand(1, 16, DIM), {"stream": token.expand(1, 16, DIM)}) for token in tokens])
        assert torch.allclose(each[:, 0, 0], -0.4 * tokens, atol=1e-6)


def test_layers_of_one_class_are_judged_by_what_each_of_them_is_handed() -> None:
    found = {name: weights for name, _, weights in find_layers(Model(crossed=True))}
    assert not isinstance(found["layers.0"], Skipped)
    assert isinstance(found["layers.1"], Skipped)


class Twice(Model):
    """Its first layer attends to other tokens, and then to its own."""

    def forward(self, image: Tensor) -> Tensor:
        assert image.shape[2] >= 8
        x = self.stem(F.interpolate(image, (16, 16))).flatten(2).mT
        x = x + self.layers[0](x, {"stream": x.flip(1)})
        return x + self.layers[0](x, {"stream": x})


def test_every_call_of_a_layer_in_a_run_of_its_model_counts() -> None:
    found = {name: weights for name, _, weights in find_layers(Twice(crossed=False))}
    assert isinstance(found["layers.0"], Skipped)


@pytest.mark.parametrize("use", ["image", "tokens", "nothing"])
def test_a_model_that_may_be_handed_another_sequence_is_run_with_one(use: str) -> None:
    found = {name: weights for name, _, weights in find_layers(MayTakeAnother(use))}
    assert isinstance(found["layers.1"], Skipped) == (use != "nothing")


class Convolved(nn.Module):
    """CvT's attention, whose queries, keys and values are convolved first: left alone, but not its filters."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.mix = nn.ModuleList([nn.Conv1d(DIM, DIM, 5, padding=2, groups=DIM) for _ in range(3)])
        self.proj_q, self.proj_k, self.proj_v, self.proj = (nn.Linear(DIM, DIM) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        parts = [conv(x.mT).mT for conv in self.mix]
        return self.proj(attend(self.proj_q(parts[0]), self.proj_k(parts[1]), self.proj_v(parts[2]))[0])


def test_filters_in_attention_that_is_left_alone_are_found() -> None:
    rows = {row.layer: row.status for row in espalier.structure_(nn.Sequential(Convolved(), nn.Linear(DIM, 2))).layers}
    assert rows == {"0": "skipped", "0.mix.0": "written", "0.mix.1": "written", "0.mix.2": "written"}
