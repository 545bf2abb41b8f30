"""Starts that look like faults and are none: norms of every formula, learned tokens, gates, parts in lists."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import espalier
from espalier.doctor import Finding


class Norm(nn.Module):
    """A normalisation of any formula: centred or not, w or 1 + w, with a bias or without."""

    def __init__(self, width: int, shift: float, gain: float, *, centred: bool, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), gain))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.shift, self.centred = shift, centred

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.centred:
            return F.layer_norm(x, self.weight.shape, self.weight + self.shift, self.bias)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (self.weight + self.shift)
        return x if self.bias is None else x + self.bias


class OwnLayerNorm(nn.LayerNorm):
    """A layer norm of torch's own family that multiplies by 1 + w."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


def findings(model: nn.Module, check: str, **keywords: object) -> list[Finding]:
    return [f for f in espalier.diagnose(model, **keywords).findings if f.check == check]  # type: ignore[arg-type]


def block(width: int, norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), norm, nn.ReLU(), nn.Linear(width, 4))


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(2, 65),
    shift=st.sampled_from([0.0, 1.0]),
    gain=st.sampled_from([0.0, 1.0]),
    centred=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_what_a_norm_multiplies_by_decides(
    width: int, shift: float, gain: float, centred: bool, bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = block(width, Norm(width, shift, gain, centred=centred, bias=bias).to(dtype))
    severities = [f.severity for f in findings(model, "normalisation")]
    assert severities == {0.0: ["error"], 1.0: [], 2.0: ["warning"]}[shift + gain]


@pytest.mark.parametrize("gain", [0.0, 1.0])
def test_a_subclass_of_torchs_norm_is_asked_too(gain: float) -> None:
    model = block(16, OwnLayerNorm(16))
    nn.init.constant_(model[1].weight, gain)  # type: ignore[arg-type]
    assert bool(findings(model, "normalisation")) == (gain == 1.0)


class Prompted(nn.Module):
    """Learned vectors that are added to the inputs or stand beside them, drawn with deviation 1."""

    def __init__(self) -> None:
        super().__init__()
        self.latent_query = nn.Parameter(torch.randn(64, 512))
        self.text_prompt = nn.Parameter(torch.randn(10, 512))
        self.pad_up = nn.Parameter(torch.randn(1, 3, 30, 448))
        self.latents_1d = nn.Parameter(torch.randn(64, 512))
        self.query = nn.Parameter(torch.randn(512, 512))  # a matrix that multiplies


def test_learned_tokens_have_no_fan_in() -> None:
    torch.manual_seed(0)
    assert [f.layer for f in findings(Prompted(), "scale")] == ["query"]


class Gate(nn.Module):
    """A gated delta layer: a decay and steps, with the skip of a state-space layer or without, bounded or not."""

    def __init__(self, *, skip: bool, drawn: bool, bound: float | None = None) -> None:
        super().__init__()
        self.gate_lower_bound = bound
        self.A_log = nn.Parameter(torch.zeros(8))
        self.dt_bias = nn.Parameter(torch.randn(8) - 4 if drawn else torch.zeros(8))
        if skip:
            self.D = nn.Parameter(torch.ones(8))


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("drawn", [True, False])
def test_a_decay_of_one_is_an_error_unless_a_gate_starts_there(skip: bool, drawn: bool) -> None:
    torch.manual_seed(0)
    found = [f for f in findings(Gate(skip=skip, drawn=drawn), "state-space") if f.layer == "A_log"]
    assert [f.severity for f in found] == ["warning" if drawn and not skip else "error"]


def test_a_bounded_gate_starts_at_a_decay_of_one() -> None:
    torch.manual_seed(0)
    assert not findings(Gate(skip=False, drawn=True, bound=-5.0), "state-space")
    assert findings(Gate(skip=False, drawn=False, bound=-5.0), "state-space")


class Parallel(nn.Module):
    """Blocks whose parts lie in lists of their own, as in XLM: attention beside small norms."""

    def __init__(self, scales: list[float]) -> None:
        super().__init__()
        self.mixers = nn.ModuleList(nn.Linear(16, 16) for _ in scales)
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in scales)
        self.scales = scales

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for mixer, norm, scale in zip(self.mixers, self.norms, self.scales, strict=True):
            x = norm(x + scale * mixer(x))
        return x


@pytest.mark.parametrize(("scales", "fault"), [([1e-9] * 4, False), ([1e-9, 1e-9, 1e-9, 1], True)])
def test_lists_of_blocks_are_compared_with_themselves(scales: list[float], fault: bool) -> None:
    torch.manual_seed(0)
    assert bool(findings(Parallel(scales), "gradients", example=torch.randn(4, 8, 16))) == fault


def test_gains_drawn_about_a_small_mean_are_fresh() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Conv2d(16, 64, 3), nn.BatchNorm2d(64), nn.ReLU()) for _ in range(3)))
    for _, norm, _ in model:
        nn.init.normal_(norm.weight, 0.1, 0.1)  # as RepVGG's start in timm
        nn.init.normal_(norm.bias, std=0.1)
    assert not findings(model, "batch-norm")
    for _, norm, _ in model:
        nn.init.uniform_(norm.weight, 0.05, 1.2)  # no draw: trained weights whose statistics were not saved
    assert len(findings(model, "batch-norm")) == 3


def test_a_branch_may_be_closed_where_its_block_has_a_shortcut() -> None:
    torch.manual_seed(0)
    model = nn.Module()
    model.stages = nn.ModuleList(nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2)) for width in (16, 24, 32, 48))
    nn.init.zeros_(model.stages[1][1].weight)  # the first block of a stage changes the width and has none
    assert not findings(model, "normalisation")


def drawn_gains(trained: bool) -> nn.Sequential:
    """DCGAN's generator and start: batch norm's gains are drawn around one, its biases are zero."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for channels, out in ((16, 32), (32, 16), (16, 16)):
        norm = nn.BatchNorm2d(out)
        nn.init.normal_(norm.weight, 1, 0.02)
        if trained:
            nn.init.normal_(norm.bias, 0, 0.02)
        layers += [nn.ConvTranspose2d(channels, out, 4, 2, 1, bias=False), norm, nn.ReLU()]
    model = nn.Sequential(*layers)
    for layer in model[::3]:
        nn.init.normal_(layer.weight, 0, 0.02)
    return model


@pytest.mark.parametrize("trained", [False, True])
def test_gains_drawn_around_one_are_a_fresh_start_while_the_biases_stand(trained: bool) -> None:
    diagnosis = espalier.diagnose(drawn_gains(trained))
    assert diagnosis.trained == trained
    assert {finding.check for finding in diagnosis.findings} == ({"batch-norm"} if trained else set())


def test_checks_of_a_fresh_start_look_at_gains_drawn_around_one() -> None:
    model = drawn_gains(trained=False)
    nn.init.normal_(model[3].weight, 0, 5)
    assert "scale" in {finding.check for finding in espalier.diagnose(model).findings}


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations.weight_norm])
def test_layers_that_are_divided_by_a_norm_are_healthy(norm: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(norm(nn.Conv2d(3, 16, 3)), nn.LeakyReLU(0.2), nn.Flatten(), norm(nn.Linear(576, 4)))
    x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert not espalier.diagnose(model, x).findings


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_a_bag_of_tokens_is_a_table(mode: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.EmbeddingBag(50, 64, mode=mode), nn.Linear(64, 4))
    assert not espalier.diagnose(model).findings
    model[0].weight.data *= 20
    assert {finding.check for finding in espalier.diagnose(model).findings} == {"scale-of-inputs"}
