"""Parameters that are no layer's weight: computed tables of equal rows, learned queries of zero."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import espalier


def severities(model: nn.Module, layer: str, check: str, example: Tensor | None = None) -> list[str]:
    found = espalier.diagnose(model, example).findings
    return [f.severity for f in found if f.layer == layer and f.check == check]


def gradient_of(model: nn.Module, name: str, x: Tensor) -> Tensor:
    """Return a parameter's gradient of a random sum of the outputs."""
    model.zero_grad(set_to_none=True)
    out = model(x)
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    gradient = model.get_parameter(name).grad
    model.zero_grad(set_to_none=True)
    assert gradient is not None
    return gradient


class StateSpace(nn.Module):
    """S4D (state-spaces/s4): every channel starts at the same frequencies and decays, and has readouts of its own."""

    def __init__(self, channels: int, states: int) -> None:
        super().__init__()
        self.log_dt = nn.Parameter(torch.rand(channels) * math.log(100) + math.log(0.001))
        self.C = nn.Parameter(torch.view_as_real(torch.randn(channels, states, dtype=torch.cfloat)))
        self.log_A_real = nn.Parameter(torch.log(0.5 * torch.ones(channels, states)))
        self.A_imag = nn.Parameter(math.pi * torch.arange(states).float().repeat(channels, 1))

    def forward(self, u: Tensor) -> Tensor:
        """Convolve every channel of (B, L, channels) with its kernel."""
        dt, c = self.log_dt.exp(), torch.view_as_complex(self.C)
        a = -self.log_A_real.exp() + 1j * self.A_imag
        steps = a * dt[:, None]
        powers = torch.exp(steps[..., None] * torch.arange(u.shape[1]))
        kernel = 2 * torch.einsum("hn,hnl->hl", c * (torch.exp(steps) - 1) / a, powers).real
        size = 2 * u.shape[1]
        out = torch.fft.irfft(torch.fft.rfft(u.mT, n=size) * torch.fft.rfft(kernel, n=size), n=size)
        return out[..., : u.shape[1]].mT


@pytest.mark.parametrize("probed", [False, True])
@pytest.mark.parametrize(("channels", "states"), [(32, 16), (16, 64), (8, 5)])
def test_frequencies_of_every_channel_are_no_dead_units(channels: int, states: int, probed: bool) -> None:
    torch.manual_seed(0)
    model, x = StateSpace(channels, states), torch.randn(2, 20, channels)
    rows = gradient_of(model, "A_imag", x)
    assert float((rows - rows.mean(0)).norm()) > 0.1 * float(rows.norm())  # the rows part in the first step
    assert severities(model, "A_imag", "equal-units", x if probed else None) == ["note"]


class Table(nn.Module):
    """A table of a row for each channel, read out with coefficients of the channel's own, or with none."""

    def __init__(self, row: Tensor, channels: int, name: str, *, apart: bool) -> None:
        super().__init__()
        self.register_parameter(name, nn.Parameter(row.expand(channels, -1).clone()))
        self.name, self.mix = name, torch.randn(channels) if apart else torch.ones(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, states)."""
        return torch.tanh(x[:, None] * self.get_parameter(self.name)).mul(self.mix[:, None]).sum(1)


ROWS = {
    "ramp": lambda n: torch.linspace(-1, 1, n),
    "logarithms": lambda n: torch.linspace(-6, -1, n),
    "powers": lambda n: 2.0 ** -torch.arange(n),
    "wave": lambda n: torch.sin(torch.arange(n) / 3),
    "slopes": lambda n: torch.cat([2.0 ** -torch.arange(n // 2), 2.0 ** -(torch.arange(n - n // 2) + 0.5)]),
    "pairs": lambda n: torch.arange(n).div(2, rounding_mode="floor").add(1) * (-1.0) ** torch.arange(n),
    "interleaved": lambda n: torch.where(torch.arange(n) % 2 == 0, torch.arange(n) / 9, 5 + torch.arange(n) / 7).cos(),
    "grid": lambda n: torch.linspace(0, 1, n).square(),
}


@settings(max_examples=60, deadline=None)
@given(
    row=st.sampled_from(list(ROWS)),
    states=st.integers(16, 64),
    channels=st.integers(2, 33),
    name=st.sampled_from(["time_decay", "centers", "mu", "omega", "w0", "thresholds", "knots"]),
    apart=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_gradients_decide_of_a_computed_table(
    row: str, states: int, channels: int, name: str, apart: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    model, x = Table(ROWS[row](states), channels, name, apart=apart), torch.randn(32, states)
    assert severities(model, name, "equal-units") == ["note"]
    rows = gradient_of(model, name, x)
    spread = float((rows - rows[:1]).norm() / rows.norm())
    assume(not 1e-5 < spread < 1e-2)  # two rows that happen to move nearly alike may be called either
    stay = spread <= 1e-5
    assert stay != apart
    assert severities(model, name, "equal-units", x) == ["error" if stay else "note"]


# One draw of 10,000 looks computed: the examples are the same in every run.
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    channels=st.integers(2, 33),
    states=st.integers(16, 96),
    kind=st.sampled_from(["normal", "uniform"]),
    probed=st.booleans(),
)
def test_noise_that_repeats_is_an_error_in_a_table_too(channels: int, states: int, kind: str, probed: bool) -> None:
    torch.manual_seed(100 * channels + states)
    row = torch.randn(states) if kind == "normal" else torch.rand(states) - 0.5
    model = Table(row, channels, "experts", apart=True)
    assert severities(model, "experts", "equal-units", torch.randn(32, states) if probed else None) == ["error"]


@pytest.mark.parametrize("probed", [False, True])
def test_equal_rows_of_a_layers_weight_are_an_error(probed: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))
    model[0].weight.data = torch.linspace(-0.1, 0.1, 32).repeat(16, 1)
    assert severities(model, "0.weight", "equal-units", torch.randn(32, 32) if probed else None) == ["error"]


def test_equal_filters_that_see_a_channel_each_are_a_note() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 5, groups=8))
    window = torch.linspace(0, 1, 25).cos() / 25
    model[0].weight.data = window.view(1, 1, 5, 5).repeat(8, 1, 1, 1)
    assert severities(model, "0.weight", "equal-units") == ["note"]


class Pooling(nn.Module):
    """Attention pooling by learned queries; the keys are the inputs, a layer's outputs, or a parameter's."""

    def __init__(self, keys: str, head: bool = True) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(3, 64))
        if keys == "layer":
            self.key = nn.Linear(64, 64, bias=False)
        elif keys == "parameter":
            self.key = nn.Parameter(torch.randn(64, 64) / 8)
        self.head = nn.Linear(192, 10)
        if not head:
            nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, 10) from (B, L, 64)."""
        key = getattr(self, "key", None)
        k = x if key is None else key(x) if isinstance(key, nn.Linear) else x @ key
        return self.head(((self.query @ k.mT / 8).softmax(-1) @ x).flatten(1))


@pytest.mark.parametrize("keys", ["inputs", "layer", "parameter"])
@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("probed", [False, True])
def test_queries_of_zero_learn_where_keys_are_not_zero(keys: str, closed: bool, probed: bool) -> None:
    torch.manual_seed(0)
    model, x = Pooling(keys), torch.randn(4, 9, 64)
    if closed and keys != "inputs":
        nn.init.zeros_(model.key.weight if keys == "layer" else model.key)
    learns = bool(gradient_of(model, "query", x).any())
    assert learns != (closed and keys != "inputs")
    found = severities(model, "query", "constant", x if probed else None)
    assert found == ["note" if learns else "error"]


def test_queries_of_zero_behind_a_closed_head_learn_from_the_second_step() -> None:
    torch.manual_seed(0)
    model, x = Pooling("inputs", head=False), torch.randn(4, 9, 64)
    assert not gradient_of(model, "query", x).any()
    assert severities(model, "query", "constant", x) == ["note"]


class Squared(nn.Module):
    """A learned query that is squared: nothing passes a zero."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.head = nn.Parameter(torch.zeros(8, 16)), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, 4) from (B, 16)."""
        return self.head(x @ self.query.square().mT)


def test_a_gradient_of_zero_is_an_error_of_its_own() -> None:
    torch.manual_seed(0)
    model, x = Squared(), torch.randn(8, 16)
    assert not gradient_of(model, "query", x).any()
    assert severities(model, "query", "constant") == ["note"]
    assert severities(model, "query", "constant", x) == ["error"]


@pytest.mark.parametrize("name", ["qkv", "in_proj", "gate_up_proj"])
def test_a_parameter_that_holds_both_factors_may_not_be_zero(name: str) -> None:
    model = nn.Linear(16, 16)
    model.register_parameter(name, nn.Parameter(torch.zeros(48, 16)))
    assert severities(model, name, "constant") == ["error"]
