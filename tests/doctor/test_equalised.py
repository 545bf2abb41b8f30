"""Layers that scale their weight in every pass: what reaches the outputs is judged, not the stored numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import espalier


def scales(model: nn.Module, example: object = None) -> list[str]:
    return [f.layer for f in espalier.diagnose(model, example).findings if f.check == "scale"]


class EqualLinear(nn.Module):
    """StyleGAN's layer: noise of deviation one, times a constant in every pass."""

    def __init__(self, inputs: int, outputs: int, factor: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, outputs)."""
        return F.linear(x, self.weight * self.factor, self.bias)


class EqualConv(nn.Conv2d):
    """A convolution whose weight is scaled."""

    factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, outputs, H, W)."""
        return self._conv_forward(x, self.weight * self.factor, self.bias)


class Standardised(nn.Conv2d):
    """A convolution with standardised weights: their size says nothing."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, outputs, H, W)."""
        flat = self.weight.flatten(1)
        weight = (flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True) / math.sqrt(flat.shape[1])
        return self._conv_forward(x, weight.view_as(self.weight), self.bias)


class Modulated(nn.Module):
    """StyleGAN2's convolution: takes a style, too, so that it cannot be asked."""

    def __init__(self, width: int, factor: float) -> None:
        super().__init__()
        self.weight, self.factor = nn.Parameter(torch.randn(width, width, 3, 3)), factor

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """Return (B, width, H, W)."""
        return F.conv2d(x * style, self.weight * self.factor, padding=1)


@settings(max_examples=40, deadline=None)
@given(width=st.integers(64, 256), exponent=st.floats(-0.8, 0.3), probed=st.booleans(), seed=st.integers(0, 2**16))
def test_growth_of_the_signal_decides(width: int, exponent: float, probed: bool, seed: int) -> None:
    torch.manual_seed(seed)
    model, x = nn.Sequential(EqualLinear(width, width, width**exponent)), torch.randn(64, width)
    growth = float(model(x).detach().square().mean().sqrt() / x.square().mean().sqrt())
    if not 3.5 < growth < 4.5:  # at the threshold chance decides
        assert bool(scales(model, x if probed else None)) == (growth > 4)


@pytest.mark.parametrize("probed", [False, True])
def test_stylegan_layers_are_healthy(probed: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(EqualLinear(512, 512, 512**-0.5), nn.LeakyReLU(0.2), EqualLinear(512, 512, 512**-0.5))
    diagnosis = espalier.diagnose(model, torch.randn(8, 512) if probed else None)
    assert not [f for f in diagnosis.findings if f.severity != "note"]


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "torch's own": (lambda: nn.Conv2d(64, 64, 3), True),
    "equalised": (lambda: EqualConv(64, 64, 3), False),
    "another class, unscaled": (lambda: EqualConv(64, 64, 3), True),
    "standardised": (lambda: Standardised(64, 64, 3), False),
}


@pytest.mark.parametrize("kind", list(CONVOLUTIONS))
@pytest.mark.parametrize("probed", [False, True])
def test_convolutions_of_every_class_are_judged_by_what_they_do(kind: str, probed: bool) -> None:
    torch.manual_seed(0)
    build, fault = CONVOLUTIONS[kind]
    layer = build()
    nn.init.normal_(layer.weight)  # type: ignore[arg-type]
    if kind == "equalised":
        layer.factor = 576**-0.5  # type: ignore[assignment]
    x = torch.randn(2, 64, 8, 8) if probed else None
    assert bool(scales(nn.Sequential(layer), x)) == fault


@pytest.mark.parametrize("factor", [1.0, (64 * 9) ** -0.5])
def test_a_layer_that_cannot_be_asked_is_judged_by_a_batch(factor: float) -> None:
    torch.manual_seed(0)
    model = Modulated(64, factor)
    assert not scales(model)
    example = (torch.randn(2, 64, 8, 8), torch.randn(2, 64, 1, 1))
    assert bool(scales(model, example)) == (factor == 1)


class Bare(nn.Module):
    """A matrix that is called no weight, beside a layer, scaled or not."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.mixing, self.factor, self.linear = nn.Parameter(torch.randn(128, 128)), factor, nn.Linear(128, 128)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, 128)."""
        return self.linear(x @ self.mixing * self.factor)


@pytest.mark.parametrize("factor", [1.0, 128**-0.5])
def test_a_bare_matrix_is_withdrawn_where_outputs_are_in_range(factor: float) -> None:
    torch.manual_seed(0)
    assert scales(Bare(factor)) == ["mixing"]
    assert scales(Bare(factor), torch.randn(32, 128)) == (["mixing"] if factor == 1 else [])


def test_asking_leaves_no_trace() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(EqualLinear(256, 256, 1.0), nn.Dropout())
    layer[0].weight.grad = torch.ones(256, 256)
    before, state = layer[0].weight.detach().clone(), torch.random.get_rng_state()
    assert scales(layer) == ["0.weight"]
    assert torch.equal(before, layer[0].weight)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(layer[0].weight.grad, torch.ones(256, 256))


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_directions_have_no_scale(norm: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(256, 256)
    nn.init.normal_(layer.weight)
    with torch.no_grad():
        layer = norm(layer)
    if hasattr(layer.parametrizations.weight, "original0"):
        nn.init.ones_(layer.parametrizations.weight.original0)  # type: ignore[arg-type, union-attr]
    assert float(layer.weight.detach().norm(dim=1).max()) < 1.5
    assert not scales(nn.Sequential(layer))
