"""Mimetic state-space weights: the formulas in isolation, and what the figures say of them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from espalier.errors import EspalierError
from espalier.init import FilterCovariance, MimeticSSM, filter_covariance, measure_ssm, mimetic_ssm_, token_memory
from espalier.init.ssm import inverse_softplus
from espalier.nn import selective_scan, ssd


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layer(state_size: int, width: int, groups: int = 1, channels: int = 6) -> dict[str, Tensor]:
    """Return weights of a layer as random numbers that no initialiser would write."""
    g = seeded(99)
    shapes = {"w_b": (groups * state_size, width), "w_c": (groups * state_size, width), "a_log": (channels, state_size)}
    shapes |= {"delta_bias": (channels,), "w_delta": (channels, 9), "conv_weight": (channels, 1, 4)}
    return {name: 3 + torch.randn(shape, generator=g) for name, shape in (shapes | {"conv_bias": (channels,)}).items()}


@settings(deadline=None, max_examples=12)
@given(st.floats(-1, 1), st.sampled_from([16, 64]), st.sampled_from([1, 2]), st.floats(0.25, 4), st.integers(0, 99))
def test_products_of_every_group_are_near_the_identity(
    rho: float, state_size: int, groups: int, gain: float, seed: int
) -> None:
    width, weights = 160, layer(state_size, 160, groups)
    mimetic_ssm_(**weights, groups=groups, correlate=rho, gain=gain, generator=seeded(seed))
    for b, c in zip(weights["w_b"].chunk(groups), weights["w_c"].chunk(groups), strict=True):
        product = c.double().T @ b.double()
        diagonal = product.diagonal()
        off = product[~torch.eye(width, dtype=torch.bool)]
        # A diagonal entry is a mean of N products of correlated normals: variance gain²(1 + ρ²)/N.
        assert abs(float(diagonal.mean()) - gain * rho) < 6 * gain * ((1 + rho**2) / state_size / width) ** 0.5
        assert float(off.std()) == pytest.approx(gain / state_size**0.5, rel=0.15)
        for rows in (b, c):
            assert float(rows.var()) == pytest.approx(gain / state_size, rel=0.15)


def test_full_correlation_makes_the_maps_equal_and_keeping_w_b_keeps_its_scale() -> None:
    weights = layer(16, 40)
    mimetic_ssm_(**weights, generator=seeded())
    assert torch.equal(weights["w_b"], weights["w_c"])
    kept = layer(16, 40)
    before = kept["w_b"].clone()
    mimetic_ssm_(**kept, correlate=0.5, generator=seeded())
    assert torch.equal(kept["w_b"], before)
    fresh = (kept["w_c"] - 0.5 * before) / 0.75**0.5
    assert float(fresh.std()) == pytest.approx(float(before.square().mean().sqrt()), rel=0.1)
    assert abs(float(fresh.mean())) < 0.5  # the mean of W_B (3) is not the fresh part's


@pytest.mark.parametrize("rule", ["constant", "scaled"])
@pytest.mark.parametrize("shape", [(3, 16), (5,)])
def test_rates(rule: str, shape: tuple[int, ...]) -> None:
    weights = layer(16, 8) | {"a_log": torch.full(shape, 7.0)}
    mimetic_ssm_(**weights, decay=8.0, decay_rule=rule, generator=seeded())
    rates = weights["a_log"].double().exp()
    if rule == "constant":
        torch.testing.assert_close(rates, torch.full(shape, math.exp(-8), dtype=torch.float64))
    elif len(shape) == 2:
        # exp(−8 log n) = n⁻⁸, never below exp(−20): the first state keeps the reference's rate of 1.
        expected = torch.arange(1.0, 17, dtype=torch.float64).pow(-8).clamp_min(math.exp(-20))
        torch.testing.assert_close(rates, expected.expand(shape), rtol=1e-5, atol=0)
    else:
        references = rates.pow(-1 / 8)
        assert references.min() >= 1
        assert (references <= 16).logical_or(rates <= math.exp(-20) * 1.001).all()
        assert len(references.unique()) > 1


def test_a_decay_beyond_float_stops_at_the_lowest_rate() -> None:
    weights = layer(4, 8)
    mimetic_ssm_(**weights, decay=300.0)
    assert (weights["a_log"] == -20).all()


@settings(deadline=None, max_examples=30)
@given(st.floats(1e-6, 50))
def test_step_bias_inverts_softplus(delta: float) -> None:
    bias = torch.tensor(inverse_softplus(delta), dtype=torch.float64)
    assert float(F.softplus(bias)) == pytest.approx(delta, rel=1e-9)


PARTS = {
    "decay": ({"decay": 8.0}, {"a_log"}),
    "delta": ({"delta": 1.0}, {"delta_bias"}),
    "correlate": ({"correlate": 1.0}, {"w_c"}),
    "gain": ({"correlate": 1.0, "gain": 1.0}, {"w_b", "w_c"}),
    "convolution": ({"convolution": True}, {"conv_weight", "conv_bias"}),
    "covariance": ({"convolution": "covariance"}, {"conv_weight"}),
    "delta_weight": ({"delta_weight": 0.5}, {"w_delta"}),
    "nothing": ({}, set()),
}


@pytest.mark.parametrize("part", PARTS)
def test_each_part_writes_its_own_tensors_and_no_other(part: str) -> None:
    asked, written = PARTS[part]
    weights, before = layer(16, 8), layer(16, 8)
    mimetic_ssm_(**weights, **({"decay": None, "delta": None, "correlate": None} | asked), generator=seeded())
    assert {name for name in weights if not torch.equal(weights[name], before[name])} == written


def test_convolution_passes_its_newest_input_and_step_weights_shrink() -> None:
    weights = layer(16, 8)
    mimetic_ssm_(**weights, convolution=True, delta_weight=0.5, generator=seeded())
    x = torch.randn(1, 6, 11, generator=seeded(1))
    y = F.conv1d(F.pad(x, (3, 0)), weights["conv_weight"], weights["conv_bias"], groups=6)
    torch.testing.assert_close(y, x, rtol=1e-6, atol=1e-6)
    assert 0.4 / 3 < float(weights["w_delta"].abs().max()) <= 0.5 / 3
    mimetic_ssm_(**weights, delta_weight=0.0)
    assert not weights["w_delta"].any()


def test_filters_of_the_closed_form_are_centred_on_the_newest_tap() -> None:
    weights = layer(16, 8, channels=20_000)
    mimetic_ssm_(**weights, convolution="covariance", generator=seeded())
    taps = weights["conv_weight"].double().flatten(1)
    sigma = FilterCovariance().sigma_at(0.5)
    wanted = filter_covariance(4, sigma, dim=1, centre="last")
    torch.testing.assert_close(taps.T @ taps / len(taps), wanted, atol=6 * 2**0.5 / len(taps) ** 0.5, rtol=0)
    assert wanted.diagonal().argmax() == 3
    with pytest.raises(EspalierError, match="convolution is 'covarianc'"):
        MimeticSSM(convolution="covarianc")  # type: ignore[arg-type]


def test_a_convolution_too_small_for_the_closed_form_is_refused_before_anything_is_written() -> None:
    weights, before = layer(16, 8), layer(16, 8)
    weights["conv_weight"] = weights["conv_weight"][..., :2]
    with pytest.raises(EspalierError):
        mimetic_ssm_(**weights, convolution="covariance", generator=seeded())
    assert all(torch.equal(weights[name], before[name]) for name in weights if name != "conv_weight")


def test_writing_twice_is_writing_once_and_the_generator_decides() -> None:
    once, twice = layer(16, 8), layer(16, 8)
    state = torch.random.get_rng_state()
    options = {"decay_rule": "scaled", "correlate": 0.3, "convolution": True, "delta_weight": 0.2}
    mimetic_ssm_(**once, **options, generator=seeded(5))
    for _ in range(2):
        mimetic_ssm_(**twice, **options, generator=seeded(5))
    assert all(torch.equal(once[name], twice[name]) for name in once)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_meta_and_bfloat16() -> None:
    weights = {name: tensor.to("meta") for name, tensor in layer(16, 8).items()}
    mimetic_ssm_(**weights)
    low = {name: tensor.bfloat16() for name, tensor in layer(64, 200).items()}
    mimetic_ssm_(**low, correlate=0.6, generator=seeded())
    measured = measure_ssm(low["w_b"], low["w_c"], low["a_log"], low["delta_bias"])
    assert measured["correlation"] == pytest.approx(0.6, abs=0.05)
    assert measured["delta"] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("steps", [0, 1, 16, 64])
def test_memory_is_what_the_recurrences_leave_of_a_pulse(steps: int) -> None:
    # One token, then zeros: with B = C = 1 the output is Δ Σ_n Ā_nᵗ per channel.
    a_log, bias = torch.randn(3, 4, generator=seeded(1)).double(), torch.randn(3, generator=seeded(2)).double() - 2
    length, delta = steps + 1, F.softplus(bias)
    x = torch.zeros(1, length, 3, dtype=torch.float64)
    x[:, 0] = 1
    maps = torch.ones(1, length, 4, dtype=torch.float64)
    y = selective_scan(x, delta.expand(1, length, 3).contiguous(), -a_log.exp(), maps, maps)
    left = float((y[0, -1] / y[0, 0]).mean())
    assert token_memory(a_log, bias, steps) == pytest.approx(left, rel=1e-10)

    heads = a_log[:, 0]
    y = ssd(x[..., None], delta.expand(1, length, 3), -heads.exp(), maps[..., None, :], maps[..., None, :])
    left = float((y[0, -1] / y[0, 0]).mean())
    assert token_memory(heads, bias, steps) == pytest.approx(left, rel=1e-10)


def test_figures_equal_their_definitions() -> None:
    w = layer(16, 8)
    measured = measure_ssm(w["w_b"], w["w_c"], w["a_log"], w["delta_bias"], w["conv_weight"])
    product = w["w_c"].double().T @ w["w_b"].double()
    assert measured["diagonal"] == pytest.approx(float(product.diagonal().mean()))
    cosine = torch.cosine_similarity(w["w_b"].double().flatten(), w["w_c"].double().flatten(), 0)
    assert measured["correlation"] == pytest.approx(float(cosine))
    target = torch.zeros(6, 1, 4)
    target[..., -1] = 1
    distance = (w["conv_weight"] - target).square().sum().sqrt() / math.sqrt(6)
    assert measured["convolution"] == pytest.approx(float(distance), rel=1e-5)
    decays = (-F.softplus(w["delta_bias"])[:, None] * w["a_log"].exp()).exp()
    assert measured["decay"] == pytest.approx(float(decays.mean()), abs=1e-6)
    # Two groups: the mean over both products.
    both = torch.cat([w["w_b"], 2 * w["w_b"]]), torch.cat([w["w_c"], w["w_c"]])
    assert measure_ssm(*both, w["a_log"], w["delta_bias"], groups=2)["diagonal"] == pytest.approx(
        1.5 * measured["diagonal"]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"correlate": 1.5}, "correlate is 1.5: give a correlation in −1…1"),
        ({"decay": -1.0}, "decay is -1.0: give a finite number of at least 0"),
        ({"delta": 0.0}, "delta is 0.0: give a step from 4.3e-18 to 100"),
        ({"delta": 150.0}, "delta is 150.0"),
        ({"delta": "1"}, "delta is '1'"),
        ({"decay": True}, "decay is True"),
        ({"decay": [8.0]}, r"decay is \[8.0\]"),
        ({"correlate": "high"}, "correlate is 'high'"),
        ({"decay_rule": None}, "unknown decay_rule None: choose one of constant, scaled"),
        ({"delta": float("nan")}, "delta is nan"),
        ({"gain": 0.0}, "gain is 0.0"),
        ({"delta_weight": float("inf")}, "delta_weight is inf"),
        ({"decay_rule": "constnt"}, "unknown decay_rule 'constnt': did you mean 'constant'"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(options: dict[str, float], message: str) -> None:
    weights, before = layer(16, 8), layer(16, 8)
    with pytest.raises(EspalierError, match=message):
        MimeticSSM(**options)
    with pytest.raises(EspalierError, match=message) as caught:
        mimetic_ssm_(**weights, **options)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(weights[name], before[name]) for name in weights)


@pytest.mark.parametrize("layers", [[1.5], 1.0, True, [float("nan")], ["0"], "first"])
def test_layers_that_are_no_indices_are_refused(layers: object) -> None:
    with pytest.raises(EspalierError, match=r"layers is .*: give 'all', an index"):
        MimeticSSM(layers=layers)  # type: ignore[arg-type]


def test_shapes_that_do_not_fit_are_refused() -> None:
    weights = layer(16, 8)
    with pytest.raises(EspalierError, match="groups 3 does not divide the 16 rows of w_b"):
        mimetic_ssm_(**weights, groups=3)
    with pytest.raises(EspalierError, match=r"w_b has shape \(16, 8\) and w_c \(8, 8\)"):
        mimetic_ssm_(**weights | {"w_c": weights["w_c"][:8]})
