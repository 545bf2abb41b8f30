"""Biases that drown what the weight says of the input, and the special biases that do not."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import espalier


def loud(model: nn.Module, example: object = None) -> list[tuple[str, str]]:
    found = espalier.diagnose(model, example).findings
    return [(f.check, f.layer) for f in found if f.severity != "note"]


def mlp(width: int = 64, inputs: int = 32) -> nn.Sequential:
    layers = (nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    return nn.Sequential(*layers)


FILLS: dict[str, Callable[[Tensor], object]] = {
    "constant": lambda b: b.fill_(50.0),
    "negative": lambda b: b.fill_(-50.0),
    "noise": lambda b: b.normal_(0, 50),
    "noise about a constant": lambda b: b.normal_(50, 1),
    "half": lambda b: b[::2].fill_(50.0),
}


@pytest.mark.parametrize("fill", list(FILLS))
@pytest.mark.parametrize("width", [64, 512])
@pytest.mark.parametrize("place", [0, 2])
def test_a_bias_of_fifty_in_a_hidden_layer_is_named(fill: str, width: int, place: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*mlp(width)[:2], nn.Linear(width, width), nn.ReLU(), *mlp(width)[2:])
    FILLS[fill](model[place].bias.data)
    x = torch.randn(64, 32)
    hidden = model[: place + 1](x).detach()
    assert float(hidden.std(0).mean()) < float(hidden.mean(0).square().mean().sqrt()) / 20  # the input hardly counts
    assert ("scale-of-inputs", f"{place}.bias") in loud(model)
    assert ("scale-of-inputs", f"{place}.bias") in loud(model, x)


@settings(max_examples=40, deadline=None)
@given(
    convolutional=st.booleans(),
    norm=st.booleans(),
    size=st.floats(30, 1e4),
    sign=st.sampled_from([-1, 1]),
    seed=st.integers(0, 999),
)
def test_hidden_layers_of_every_kind(convolutional: bool, norm: bool, size: float, sign: int, seed: int) -> None:
    torch.manual_seed(seed)
    model: nn.Sequential
    if convolutional:
        between = nn.BatchNorm2d(24) if norm else nn.Identity()
        model = nn.Sequential(nn.Conv2d(3, 24, 3), between, nn.ReLU(), nn.Conv2d(24, 24, 3, groups=24), nn.Flatten())
    else:
        model = nn.Sequential(nn.Linear(16, 48), nn.LayerNorm(48) if norm else nn.Identity(), nn.Linear(48, 4))
    assert not loud(model)
    nn.init.constant_(model[0].bias, sign * size)  # type: ignore[arg-type]
    assert ("scale-of-inputs", "0.bias") in loud(model)


class Attention(nn.Module):
    """Attention with one bias for queries, keys and values, which no weight's width tells apart from a last layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(48, 144), nn.Linear(48, 48)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, L, 48)."""
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v))


def test_a_batch_shows_a_bias_that_the_weights_do_not() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Attention()), torch.randn(4, 16, 48)
    assert not loud(model, x)
    nn.init.constant_(model[0].qkv.bias, 50.0)
    assert not loud(model)
    assert ("scale-of-inputs", "0.qkv.bias") in loud(model, x)
    # A last layer may start at the mean of what it is to give.
    nn.init.zeros_(model[0].qkv.bias)
    nn.init.constant_(model[0].proj.bias, 50.0)
    assert not loud(model, x)


class Memory(nn.Module):
    """A recurrence with gates that start open: forget biases as usual, or spread over time scales."""

    def __init__(self, fill: str) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 64, batch_first=True), nn.Linear(64, 10)
        with torch.no_grad():
            forget = self.lstm.bias_ih_l0[64:128]
            forget.fill_(2.0) if fill == "constant" else forget.copy_(torch.rand(64).mul(1000).add(1).log())

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, 10)."""
        return self.head(self.lstm(x)[0][:, -1])


class Gated(nn.Module):
    """A highway layer: its gate starts nearly shut."""

    def __init__(self, bias: float, std: float) -> None:
        super().__init__()
        self.gate, self.value, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)
        nn.init.constant_(self.gate.bias, bias)
        nn.init.normal_(self.gate.weight, std=std)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, 10)."""
        gate = self.gate(x).sigmoid()
        return self.head(gate * self.value(x) + (1 - gate) * x)


class Detector(nn.Module):
    """RetinaNet's heads: the classes' bias is the logit of a share of 0.01, the weights have deviation 0.01."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())
        self.classes, self.boxes = nn.Conv2d(64, 9 * 20, 3, padding=1), nn.Conv2d(64, 9 * 4, 3, padding=1)
        for head in (self.classes, self.boxes):
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)
        nn.init.constant_(self.classes.bias, math.log(share / (1 - share)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and boxes."""
        x = self.body(x)
        return self.classes(x), self.boxes(x)


class Steps(nn.Module):
    """Mamba's step sizes: softplus of a small projection and a bias of −6.9 to −2.3."""

    def __init__(self, smallest: float) -> None:
        super().__init__()
        self.dt_proj, self.out = nn.Linear(4, 64), nn.Linear(64, 16)
        steps = torch.exp(torch.rand(64) * (math.log(0.1) - math.log(smallest)) + math.log(smallest))
        with torch.no_grad():
            self.dt_proj.bias.copy_(steps + torch.log(-torch.expm1(-steps)))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, 16)."""
        return self.out(nn.functional.softplus(self.dt_proj(x)))


def last(fill: Callable[[Tensor], object], std: float = 0.02) -> nn.Module:
    model = mlp(64)
    model[4] = nn.Linear(64, 100)
    nn.init.normal_(model[4].weight, std=std)
    fill(model[4].bias.data)
    return model


def shares(bias: Tensor) -> None:
    """Fill with the logarithms of the shares that classes have by Zipf's law."""
    counts = 1 / torch.arange(1.0, len(bias) + 1).square()
    bias.copy_((counts / counts.sum()).log())


HEALTHY: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "forget gate of two": (lambda: Memory("constant"), (32, 12, 8)),
    "forget gates over time scales": (lambda: Memory("spread"), (32, 12, 8)),
    "gate of minus five": (lambda: Gated(-5.0, 0.02), (32, 64)),
    "gate of five, weights small": (lambda: Gated(5.0, 1e-3), (32, 64)),
    "detector": (lambda: Detector(0.01), (2, 3, 16, 16)),
    "detector of rare things": (lambda: Detector(1e-5), (2, 3, 16, 16)),
    "steps": (lambda: Steps(1e-3), (32, 4)),
    "small steps": (lambda: Steps(1e-6), (32, 4)),
    "shares of classes": (lambda: last(shares), (32, 32)),
    "shares of classes, weights small": (lambda: last(shares, 1e-3), (32, 32)),
    "shares of a vocabulary": (lambda: last(lambda b: b.fill_(-math.log(50257))), (32, 32)),
    "mean of the targets": (lambda: last(lambda b: b.fill_(50.0)), (32, 32)),
}


@pytest.mark.parametrize("kind", list(HEALTHY))
def test_special_biases_are_healthy(kind: str) -> None:
    build, shape = HEALTHY[kind]
    torch.manual_seed(0)
    model, x = build(), torch.randn(*shape)
    assert not loud(model)
    assert not loud(model, x)


def test_a_bias_that_drowns_does_not_make_weights_look_trained() -> None:
    torch.manual_seed(0)
    model = mlp()
    nn.init.normal_(model[2].bias, std=50)  # type: ignore[arg-type]
    assert not espalier.diagnose(model).trained


def test_trained_biases_are_not_held_against_a_fresh_start() -> None:
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        x = torch.randn(64, 32)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), x[:, :10].argmax(1)).backward()
        optimizer.step()
    assert espalier.diagnose(model).trained
    assert not loud(model, torch.randn(64, 32))
    # Large inputs are met by large biases: here a shift of a hundred, as of pixels, is taken back.
    shifted = copy.deepcopy(model)
    with torch.no_grad():
        shifted[0].bias -= shifted[0].weight.sum(1) * 100
    assert espalier.diagnose(shifted).trained
    assert not loud(shifted, torch.randn(64, 32) + 100)
