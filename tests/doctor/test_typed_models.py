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
