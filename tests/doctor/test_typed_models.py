"""Models as they are typed in published repositories: healthy at their fresh start, caught when they are not."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import espalier


def complaints(model: nn.Module) -> dict[str, str]:
    """Return the check of every error and warning by its layer."""
    return {f.layer: f.check for f in espalier.diagnose(model).findings if f.severity != "note"}


class Masked(nn.Module):
    """llama2.c's attention: its causal mask is a buffer that is broadcast over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.wq = nn.Linear(32, 32, bias=False)
        self.register_buffer("mask", torch.triu(torch.full((1, 1, 16, 16), -math.inf), 1))


def test_a_causal_mask_may_be_infinite_and_no_mask_is_nan() -> None:
    model = Masked()
    assert complaints(model) == {}
    model.mask[0, 0, 0, 0] = math.nan
    assert complaints(model) == {"mask": "not-finite"}


def steps(*shape: int) -> Tensor:
    """Return softplus⁻¹ of steps between 1e-3 and 0.1, as Mamba draws them."""
    drawn = torch.exp(torch.rand(shape) * math.log(100) + math.log(1e-3))
    return drawn + torch.log(-torch.expm1(-drawn))


class FourScans(nn.Module):
    """VMamba's parameters of four directions, kept together."""

    def __init__(self, width: int = 64, states: int = 8, rank: int = 2) -> None:
        super().__init__()
        self.x_proj_weight = nn.Parameter(torch.rand(4, rank + 2 * states, width) * 0.2 - 0.1)
        self.dt_projs_weight = nn.Parameter(torch.rand(4, width, rank) - 0.5)
        self.dt_projs_bias = nn.Parameter(steps(4, width))
        self.A_logs = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(4 * width, 1))
        self.Ds = nn.Parameter(torch.ones(4 * width))


def test_several_scans_in_one_tensor_are_no_weights() -> None:
    torch.manual_seed(0)
    model = FourScans()
    assert complaints(model) == {}
    nn.init.normal_(model.dt_projs_weight, std=20.0)
    assert complaints(model) == {"dt_projs_weight": "scale"}


class Experts(nn.Module):
    """Weights and biases of eight experts, kept together."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 32, 32) * 32**-0.5)
        self.bias = nn.Parameter(torch.randn(8, 32) * 0.02 - 4.0)


def test_biases_of_several_experts_may_be_off_centre() -> None:
    torch.manual_seed(0)
    assert complaints(Experts()) == {}


class RMS(nn.Module):
    """A normalisation whose class is not called one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32))


class Mixer(nn.Module):
    """Mamba's biases: half of a fresh model's are drawn from no uniform distribution."""

    def __init__(self) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.arange(1.0, 9).log().repeat(64, 1))
        self.conv1d, self.dt_proj = nn.Conv1d(64, 64, 4, groups=64), nn.Linear(2, 64)
        self.dt_proj.bias.data = steps(64)


@pytest.mark.parametrize("normed", [False, True])
def test_a_fresh_state_space_model_looks_fresh_and_a_trained_one_trained(normed: bool) -> None:
    torch.manual_seed(0)
    parts: dict[str, nn.Module] = {"mixer": Mixer()} | ({"norm": RMS()} if normed else {})
    model = nn.ModuleList([nn.ModuleDict(parts)])
    assert not espalier.diagnose(model).trained
    if normed:
        parts["norm"].weight.data += 0.1 * torch.randn(32)
        assert espalier.diagnose(model).trained
        nn.init.zeros_(parts["norm"].weight)
        assert complaints(model) == {"0.norm.weight": "normalisation"}


def test_a_gate_that_its_bias_opens_may_have_a_weight_of_next_to_nothing() -> None:
    gate = nn.Linear(40, 40)
    nn.init.normal_(gate.weight, std=1e-6)
    nn.init.ones_(gate.bias)
    assert complaints(gate) == {}
    nn.init.zeros_(gate.bias)
    assert complaints(gate) == {"weight": "scale"}


class Normalised(nn.Module):
    """EDM2's layer: in training a pass first puts its weight back on the sphere, in place, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.passes = nn.Parameter(torch.randn(32, 24)), 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        if self.training:
            with torch.no_grad():
                self.weight.copy_(self.weight / self.weight.norm(dim=1, keepdim=True))
        return x @ self.weight.T


@pytest.mark.parametrize("example", [None, torch.ones(16, 24)])
def test_a_layer_that_writes_its_weight_in_a_pass_is_left_as_it_was(example: Tensor | None) -> None:
    model = nn.Sequential(Normalised())
    before = model[0].weight.detach().clone()
    espalier.diagnose(model, example)
    assert torch.equal(model[0].weight, before)
    assert model[0].passes == 0


class Memory(nn.Module):
    """Titans': a small network whose loss is differentiated sample by sample, within vmap."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24))

    def forward(self, x: Tensor) -> Tensor:
        weights = dict(self.net.named_parameters())

        def loss(own: dict[str, Tensor], token: Tensor) -> Tensor:
            return torch.func.functional_call(self.net, own, (token,)).square().mean()

        found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
        return self.net(x) + found["2.bias"]


def test_what_happens_within_vmap_is_not_watched() -> None:
    torch.manual_seed(0)
    assert espalier.diagnose(Memory(), torch.randn(16, 24)).ok


class Upscaler(nn.Module):
    """A convolution before a pixel shuffle, every filter four times, so that an enlarged image starts smooth (ICNR)."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.conv, self.shuffle = nn.Conv2d(16, 32, 1), nn.PixelShuffle(factor)
        self.conv.weight.data = torch.randn(8, 16, 1, 1).repeat_interleave(4, 0) * 0.2


def test_filters_may_repeat_for_the_pixels_of_a_shuffle() -> None:
    torch.manual_seed(0)
    assert complaints(Upscaler(2)) == {}
    assert complaints(Upscaler(4)) == {"conv.weight": "equal-units"}


def test_learned_memories_stand_among_keys_and_are_no_weights() -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    model.mem_k = nn.Parameter(torch.randn(20, 32))
    assert complaints(model) == {}
    model.mem_k.data *= 10.0
    assert complaints(model) == {"mem_k": "scale-of-inputs"}


def test_the_taps_of_a_filter_written_as_a_matrix_are_not_pinned() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 64)
    layer.weight.data = 0.02 * torch.randn(64, 64) + torch.diag(torch.full((63,), 0.7), 1)
    layer.weight.data[torch.arange(63), torch.arange(1, 64)] = 0.7
    assert complaints(layer) == {}
    layer.weight.data[torch.arange(63), torch.randperm(63)] = 0.7
    assert complaints(layer) == {"weight": "pinned"}
