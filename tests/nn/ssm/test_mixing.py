"""The mixing matrix against the recurrence as a plain loop, and against attention written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.errors import EspalierError
from espalier.nn import Mamba1, Mamba2, mixing_matrix
from espalier.nn.ssm.mixing import recurrence_of
from reference.selective_scan_reference import selective_scan_loop
from reference.ssd_reference import ssd_loop


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def double_mixer(family: str, groups: int = 1, seed: int = 0) -> Mamba1 | Mamba2:
    if family == "mamba1":
        return Mamba1(12, 5, generator=seeded(seed)).double()
    return Mamba2(12, 5, head_dim=6, groups=groups, generator=seeded(seed)).double()


def loop_output(mixer: Mamba1 | Mamba2, x: Tensor) -> Tensor:
    """Run the recurrence token by token, without D and the gate; (B, L, H, P) or (B, L, E)."""
    loop = selective_scan_loop if isinstance(mixer, Mamba1) else ssd_loop
    return loop(*recurrence_of(mixer, x))[0]


@settings(deadline=None, max_examples=20)
@given(
    st.sampled_from(["mamba1", "mamba2"]),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 17),
    st.integers(0, 99),
    st.sampled_from([0.0, math.log(1e300), math.inf]),
)
def test_acts_on_the_values_as_the_recurrence_does(
    family: str, groups: int, length: int, seed: int, rate: float
) -> None:
    mixer = double_mixer(family, groups, seed)
    with torch.no_grad():
        mixer.A_log[0] = rate  # up to a head, or a channel, that forgets all at every token
    x = 3 * torch.randn(2, length, 12, generator=seeded(seed), dtype=torch.float64)
    mixing, values = mixing_matrix(mixer, x), recurrence_of(mixer, x).values
    rows = values if values.ndim == 4 else values[..., None]
    mixed = torch.einsum("bhts,bshp->bthp", mixing, rows).reshape(values.shape)
    torch.testing.assert_close(mixed, loop_output(mixer, x), rtol=1e-10, atol=1e-12)
    assert torch.equal(mixing, mixing.tril())


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_autocast_narrows_what_the_mixer_is_given_and_not_its_matrix(family: str) -> None:
    mixer, x = double_mixer(family).float(), torch.randn(2, 9, 12, generator=seeded(1))
    with torch.autocast("cpu", torch.bfloat16):
        mixing, inputs = mixing_matrix(mixer, x), recurrence_of(mixer, x)
    rows = inputs.values if inputs.values.ndim == 4 else inputs.values[..., None]
    mixed = torch.einsum("bhts,bshp->bthp", mixing, rows).reshape(inputs.values.shape)
    loop = selective_scan_loop if family == "mamba1" else ssd_loop
    torch.testing.assert_close(mixed.double(), loop(*(t.double() for t in inputs))[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_a_changed_convolution_shows(family: str) -> None:
    mixer, x = double_mixer(family), torch.randn(2, 9, 12, generator=seeded(1), dtype=torch.float64)
    tripled = double_mixer(family)
    with torch.no_grad():
        for parameter in tripled.conv1d.parameters():
            parameter *= 3
    mixer.conv1d.register_forward_hook(lambda layer, given, out: 3 * out)
    torch.testing.assert_close(mixing_matrix(mixer, x), mixing_matrix(tripled, x))


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_values_are_those_of_the_module_itself(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # What the mixer hands to its scan, caught on the way, is what the mixing matrix is computed from.
    import espalier.nn.ssm.mamba as module

    mixer, x = double_mixer(family).float(), torch.randn(2, 9, 12, generator=seeded(1))
    name: str = "selective_scan" if family == "mamba1" else "ssd"
    caught: list[Tensor] = []
    real = getattr(module, name)

    def catch(values: Tensor, delta: Tensor, *rest: Tensor, **options: Any) -> Any:
        steps = F.softplus(delta + options["delta_bias_E"]) if options.get("delta_softplus") else delta
        caught.extend((values, steps, *rest))
        return real(values, delta, *rest, **options)

    monkeypatch.setattr(module, name, catch)
    mixer(x)
    for mine, handed in zip(recurrence_of(mixer, x), caught, strict=False):
        torch.testing.assert_close(mine, handed.detach())


def test_without_decay_it_is_causal_linear_attention() -> None:
    mixer = double_mixer("mamba2")
    with torch.no_grad():
        mixer.A_log.fill_(-60)
    x = torch.randn(1, 7, 12, generator=seeded(2), dtype=torch.float64)
    _, delta, _, b, c = recurrence_of(mixer, x)
    mixing = mixing_matrix(mixer, x)
    for head in range(mixer.num_heads):
        for t in range(7):
            for s in range(7):
                expected = float(c[0, t, 0] @ b[0, s, 0] * delta[0, s, head]) if s <= t else 0.0
                assert float(mixing[0, head, t, s]) == pytest.approx(expected, abs=1e-12)


def test_long_steep_decays_stay_finite() -> None:
    mixer = double_mixer("mamba2").float()
    with torch.no_grad():
        mixer.A_log.fill_(6)
        mixer.dt_bias.fill_(5)
    assert mixing_matrix(mixer, torch.randn(1, 300, 12, generator=seeded(3))).isfinite().all()


def test_refuses_another_module_and_another_shape_in_one_line() -> None:
    with pytest.raises(EspalierError, match="mixer is a Linear: give a Mamba1 or a Mamba2"):
        mixing_matrix(nn.Linear(3, 3), torch.zeros(1, 2, 3))
    with pytest.raises(EspalierError, match=r"x has shape \(2, 12\): give \(batch, length, 12\)"):
        mixing_matrix(double_mixer("mamba1"), torch.zeros(2, 12))
