"""The closed-form covariance against its plain-loop twin, and filters drawn from it against their target."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from espalier.errors import EspalierError
from espalier.init.filters.census import depthwise_layers
from espalier.init.filters.closed_form import (
    depthwise_covariance_,
    filter_covariance,
    sample_filters,
    unrepaired_covariance,
)
from espalier.init.filters.spec import PRESETS, FilterCovariance
from reference.covariance_reference import plain_covariance

SIGMAS = st.floats(0.05, 25.0)
# Rectangular, even, degenerate and cubic kernels; the twin is slow, so few taps.
SHAPES = st.sampled_from([(3,), (4,), (9,), (3, 3), (5, 5), (3, 6), (4, 4), (1, 7), (6, 5), (3, 3, 3), (3, 1, 4)])
PUBLISHED = st.fixed_dictionaries(
    {
        "sigma_is_std": st.booleans(),
        "wrap": st.sampled_from([None, True, False]),
        "mask": st.sampled_from(["x", "y"]),
        "centre": st.sampled_from(["middle", "last"]),
        "variant": st.sampled_from(["clip", "abs"]),
        "scale": st.sampled_from(["raw", "unit", "match_default"]),
    }
)
POSITIVE = st.fixed_dictionaries(
    {
        "sigma_is_std": st.booleans(),
        "centre": st.sampled_from(["middle", "last"]),
        "variant": st.just("psd"),
        "scale": st.sampled_from(["raw", "unit", "match_default"]),
    }
)


@settings(max_examples=150, deadline=None)
@given(sizes=SHAPES, sigma=SIGMAS, switches=st.one_of(PUBLISHED, POSITIVE))
def test_closed_form_equals_its_plain_twin(sizes: tuple[int, ...], sigma: float, switches: dict) -> None:
    ours = filter_covariance(sizes, sigma, **switches)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, plain_covariance(sizes, sigma, **switches), rtol=0, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(sizes=SHAPES, sigma=SIGMAS, data=st.data())
def test_the_centre_may_be_any_tap(sizes: tuple[int, ...], sigma: float, data: st.DataObject) -> None:
    tap = data.draw(st.tuples(*(st.integers(0, size - 1) for size in sizes)))
    ours = filter_covariance(sizes, sigma, centre=tap)
    torch.testing.assert_close(ours, plain_covariance(sizes, sigma, centre=tap), rtol=0, atol=1e-12)
    if len(set(tap)) == 1:
        assert torch.equal(ours, filter_covariance(sizes, sigma, centre=tap[0]))


def test_closed_form_equals_its_plain_twin_at_the_size_of_the_paper() -> None:
    torch.testing.assert_close(filter_covariance(9, 1.9), plain_covariance((9, 9), 1.9), rtol=0, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(k=st.integers(3, 15), sigma=SIGMAS)
def test_psd_variant_needs_no_repair(k: int, sigma: float) -> None:
    eigenvalues = torch.linalg.eigvalsh(filter_covariance(k, sigma, variant="psd"))
    assert eigenvalues[0] >= -1e-12 * eigenvalues[-1]


@settings(max_examples=30, deadline=None)
@given(k=st.integers(3, 15), sigma=SIGMAS)
def test_psd_variant_has_the_published_variances(k: int, sigma: float) -> None:
    z = torch.tensor(
        [math.exp(-((i - k // 2) ** 2 + (j - k // 2) ** 2) / (2 * sigma)) for i in range(k) for j in range(k)],
        dtype=torch.float64,
    )
    for form in (filter_covariance(k, sigma, variant="psd"), unrepaired_covariance((k, k), sigma)):
        torch.testing.assert_close(form.diagonal(), z * (1 - z / 2), rtol=0, atol=1e-14)


@settings(max_examples=40, deadline=None)
@given(k=st.integers(3, 11), sigma=SIGMAS, switches=PUBLISHED)
def test_repaired_form_is_a_covariance(k: int, sigma: float, switches: dict) -> None:
    covariance = filter_covariance(k, sigma, **switches)
    eigenvalues = torch.linalg.eigvalsh(covariance)
    assert torch.equal(covariance, covariance.mT)
    assert eigenvalues[0] >= -1e-13 * eigenvalues[-1]
    energy = {"unit": 1.0, "match_default": 1 / 3}.get(switches["scale"])
    assert energy is None or covariance.trace().item() == pytest.approx(energy, rel=1e-12)


def test_match_default_has_the_energy_of_torch_default() -> None:
    filters = nn.Conv2d(4096, 4096, 5, groups=4096).weight.detach()
    energy = filters.flatten(1).square().sum(1).mean().item()
    assert filter_covariance(5, 1.0, scale="match_default").trace().item() == pytest.approx(energy, rel=0.02)


@pytest.mark.parametrize(("mask", "least", "most"), [("x", 0.0, 0.05), ("y", 0.3, 0.5)])
def test_only_the_transposed_mask_is_largely_negative(mask: str, least: float, most: float) -> None:
    eigenvalues = torch.linalg.eigvalsh(unrepaired_covariance((9, 9), 0.4, mask=mask))
    assert least < float(-eigenvalues.clamp_max(0).sum() / eigenvalues.abs().sum()) < most


def test_clipping_adds_little_energy() -> None:
    for k, sigma in [(9, 0.5), (9, 3.0), (15, 0.5), (15, 3.0)]:
        gained = filter_covariance(k, sigma).trace() / unrepaired_covariance((k, k), sigma).trace() - 1
        assert 0 <= gained <= 0.035


def test_extreme_sigmas_stay_finite() -> None:
    for sigma in (5e-324, 1e-200, 1e300):
        for sigma_is_std in (False, True):
            assert filter_covariance(5, sigma, sigma_is_std=sigma_is_std).isfinite().all()
    tap = torch.zeros(25, 25, dtype=torch.float64)
    tap[12, 12] = 0.5
    torch.testing.assert_close(filter_covariance(5, 1e-200, sigma_is_std=True), tap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounded_once(dtype: torch.dtype) -> None:
    assert torch.equal(filter_covariance(7, 1.3, dtype=dtype), filter_covariance(7, 1.3).to(dtype))


@pytest.mark.parametrize(
    ("kernel_size", "sigma", "switches", "words"),
    [
        (2, 1.0, {}, "kernel_size 2"),
        ((2, 5), 1.0, {}, "kernel_size"),
        ((1, 1), 1.0, {}, "kernel_size"),
        ((), 1.0, {}, "kernel_size"),
        (5, 0.0, {}, "sigma 0.0"),
        (5, -1.0, {}, "sigma -1.0"),
        (5, math.nan, {}, "sigma nan"),
        (5, math.inf, {}, "sigma inf"),
        (5, 1.0, {"variant": "clipp"}, "did you mean 'clip'"),
        (5, 1.0, {"mask": "z"}, "mask 'z'"),
        (5, 1.0, {"scale": "units"}, "did you mean 'unit'"),
        (5, 1.0, {"centre": "lest"}, "did you mean 'last'"),
        (5, 1.0, {"centre": (2,)}, "centre (2,)"),
        (5, 1.0, {"centre": (2, 5)}, "centre (2, 5)"),
        (5, 1.0, {"centre": (2, 1.5)}, "centre (2, 1.5)"),
        (5, 1.0, {"centre": -1}, "centre -1"),
        (5, 1.0, {"centre": 1.5}, "centre 1.5"),
        (5, 1.0, {"rap": True}, "did you mean 'wrap'"),
        (5, 1.0, {"variant": "psd", "wrap": True}, "contradicts variant 'psd'"),
        (5, 1.0, {"variant": "psd", "mask": "y"}, "contradicts variant 'psd'"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(kernel_size: int, sigma: float, switches: dict, words: str) -> None:
    with pytest.raises(EspalierError) as caught:
        filter_covariance(kernel_size, sigma, **switches)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def frobenius_error(covariance: Tensor, count: int) -> float:
    """Root of E‖S − Σ‖² for the second moment of ``count`` Gaussian filters about their known mean 0."""
    return math.sqrt((covariance.trace() ** 2 + covariance.square().sum()).item() / count)


@settings(max_examples=25, deadline=None)
@given(k=st.integers(3, 9), sigma=SIGMAS, variant=st.sampled_from(["clip", "abs", "psd"]), seed=st.integers(0, 2**31))
def test_sampled_filters_have_the_covariance_asked_for(k: int, sigma: float, variant: str, seed: int) -> None:
    target, count = filter_covariance(k, sigma, variant=variant), 4096
    filters = sample_filters(target, count, generator=torch.Generator().manual_seed(seed))
    error = (filters.mT @ filters / count - target).norm().item()
    # A wide target is nearly of rank one and its error then nearly |χ²₁|: 4.5 standard errors leave ample room.
    assert error < 4.5 * frobenius_error(target, count)
    assert filters.mean(0).norm() < 5 * math.sqrt(target.trace().item() / count)


def test_sampling_error_falls_as_it_should() -> None:
    # The bound above would pass for a covariance a few per cent off; a million filters would not.
    target = filter_covariance(5, 1.0)
    filters = sample_filters(target, 1_000_000, generator=torch.Generator().manual_seed(0))
    assert (filters.mT @ filters / len(filters) - target).norm() < 0.01 * target.norm()


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((64, 1, 9), torch.float32), ((64, 1, 5, 7), torch.bfloat16), ((64, 1, 3, 3, 4), torch.float64)],
)
def test_weights_are_filled_in_place_and_rounded_once(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.zeros(shape, dtype=dtype))
    before = torch.get_rng_state()
    returned = depthwise_covariance_(weight, 0.9, variant="psd", generator=torch.Generator().manual_seed(3))
    assert returned is weight
    assert weight.requires_grad
    assert weight.grad_fn is None
    target = filter_covariance(shape[2:], 0.9, variant="psd")
    drawn = sample_filters(target, shape[0], generator=torch.Generator().manual_seed(3))
    assert torch.equal(weight.detach().flatten(1), drawn.to(dtype))
    assert torch.equal(torch.get_rng_state(), before), "the global generator must stay untouched"


def test_views_are_filled_and_seeds_decide() -> None:
    draws = [torch.zeros(4, 1, 5, 5) for _ in range(3)]
    for weight, seed in zip(draws, (0, 0, 1), strict=True):
        depthwise_covariance_(weight, 1.0, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    storage = torch.zeros(5, 5, 1, 4)
    depthwise_covariance_(storage.permute(3, 2, 0, 1), 1.0, generator=torch.Generator().manual_seed(0))
    assert torch.equal(storage.permute(3, 2, 0, 1), draws[0])


def test_meta_and_empty_weights_are_left_alone() -> None:
    meta = torch.empty(4, 1, 5, 5, device="meta")
    assert depthwise_covariance_(meta, 1.0) is meta
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    depthwise_covariance_(torch.empty(0, 1, 5, 5), 1.0, generator=generator)
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize(
    "weight", [torch.zeros(4, 2, 5, 5), torch.zeros(4, 1), torch.zeros(25), torch.zeros(4, 1, 5, 5, dtype=torch.int8)]
)
def test_other_weights_are_refused(weight: torch.Tensor) -> None:
    with pytest.raises(EspalierError, match="not depthwise"):
        depthwise_covariance_(weight, 1.0)


@pytest.mark.parametrize(
    ("covariance", "words"),
    [
        (torch.zeros(3, 4), "square"),
        (torch.tensor(1.0), "square"),
        (torch.tensor([[1.0, math.nan], [math.nan, 1.0]]), "finite"),
        (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), "not symmetric"),
        (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), "eigenvalue -1"),
    ],
)
def test_what_is_no_covariance_is_refused(covariance: Tensor, words: str) -> None:
    with pytest.raises(EspalierError, match=words):
        sample_filters(covariance, 3)


def test_depthwise_layers_finds_those_and_no_others() -> None:
    model = nn.Sequential()
    model.add_module("dense", nn.Conv2d(8, 8, 3))
    model.add_module("grouped", nn.Conv2d(8, 8, 3, groups=4))
    model.add_module("multiplied", nn.Conv2d(8, 16, 3, groups=8))
    model.add_module("pointwise", nn.Conv2d(8, 8, 1, groups=8))
    model.add_module("single", nn.Conv2d(1, 1, 3))
    model.add_module("plane", nn.Conv2d(8, 8, 3, groups=8, stride=2))
    model.add_module("line", nn.Conv1d(8, 8, 4, groups=8))
    model.add_module("inner", nn.Sequential(nn.Conv3d(8, 8, (1, 3, 3), groups=8)))
    assert [name for name, _ in depthwise_layers(model)] == ["multiplied", "plane", "line", "inner.0"]
    assert depthwise_layers(model)[1][1] is model.plane


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_schedule(preset: str, depth: float) -> None:
    numbers = {"patch-1": (0.16, 0.32, 2.88), "convnext": (0.15, 0.5, 0.25)}.get(preset, (0.08, 0.37, 2.9))
    expected = numbers[0] + numbers[1] * depth + 0.5 * numbers[2] * depth**2
    plan = FilterCovariance(preset)
    assert plan.sigma_at(depth) == pytest.approx(expected, rel=1e-15)
    torch.testing.assert_close(plan.covariance(5, depth), plain_covariance((5, 5), expected), rtol=0, atol=1e-12)


def test_plan_replaces_fields_and_writes_what_it_says() -> None:
    plan = FilterCovariance("patch-1", sigma0=0.5, v=0.0, a=0.0, variant="psd", scale="unit", centre="last")
    weight, twin = torch.zeros(6, 1, 4), torch.zeros(6, 1, 4)
    assert plan.write_(weight, 0.25, generator=torch.Generator().manual_seed(5)) == "σ 0.5"
    switches = {"variant": "psd", "scale": "unit", "centre": "last"}
    depthwise_covariance_(twin, 0.5, **switches, generator=torch.Generator().manual_seed(5))
    assert torch.equal(weight, twin)
    assert plan == FilterCovariance("patch-1", sigma0=0.5, v=0.0, a=0.0, variant="psd", scale="unit", centre="last")
    assert hash(plan) == hash(plan)


@pytest.mark.parametrize(
    ("rule", "three", "one"),
    [
        ("ends", [0, 1 / 2, 1], 1 / 2),
        ("starts", [0, 1 / 3, 2 / 3], 0),
        ("middles", [1 / 6, 1 / 2, 5 / 6], 1 / 2),
        ("stops", [1 / 3, 2 / 3, 1], 1),
    ],
)
def test_depth_rules(rule: str, three: list[float], one: float) -> None:
    plan = FilterCovariance(depth_rule=rule)
    assert [plan.depth_of(index, 3) for index in range(3)] == pytest.approx(three)
    assert plan.depth_of(0, 1) == one


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"preset": "patch-3"}, "did you mean 'patch-"),
        ({"preset": "closed"}, "did you mean 'closed-form'"),
        ({"sigma0": 0.0}, "sigma falls to 0"),
        ({"sigma0": 0.1, "v": -1.0, "a": 2.0}, "sigma falls to -0.15"),
        ({"sigma0": math.nan}, "sigma0 is nan"),
        ({"variant": "psd", "wrap": True}, "contradicts"),
        ({"scale": "row"}, "did you mean 'raw'"),
        ({"depth_rule": "end"}, "did you mean 'ends'"),
    ],
)
def test_bad_plans_are_refused(arguments: dict, words: str) -> None:
    with pytest.raises(EspalierError) as caught:
        FilterCovariance(**arguments)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_depth_outside_is_refused() -> None:
    with pytest.raises(EspalierError, match=r"depth 1\.5"):
        FilterCovariance().sigma_at(1.5)


@pytest.mark.parametrize("kernel", [5.0, (3.7, 3), "33", (5, None)])
def test_kernels_that_are_no_whole_numbers_are_refused(kernel: object) -> None:
    with pytest.raises(EspalierError, match="whole numbers of taps"):
        filter_covariance(kernel, 1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["sigma0", "v", "a"])
@pytest.mark.parametrize("value", [math.nan, math.inf, "0.1", 1j])
def test_schedules_that_are_no_numbers_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(EspalierError, match=f"{name} is .* give a finite number"):
        FilterCovariance(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", [3, 7, 9])
def test_a_rounded_covariance_is_still_one(kernel: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    rounded = filter_covariance(kernel, 2.0, dtype=dtype)
    filters = sample_filters(rounded, 20_000, generator=generator, dtype=torch.float64)
    truth = filter_covariance(kernel, 2.0)
    sampling = (float(truth.trace() ** 2 + truth.square().sum()) / 20_000) ** 0.5
    error = float((filters.mT @ filters / 20_000 - truth).norm())
    assert error < 4 * sampling + torch.finfo(dtype).eps * float(truth.norm())


@pytest.mark.parametrize(
    "covariance", [torch.eye(9, dtype=torch.int64), torch.eye(9) + 0j, torch.eye(9, device="meta")]
)
def test_a_covariance_of_another_kind_is_refused(covariance: Tensor) -> None:
    with pytest.raises(EspalierError, match="finite square matrix"):
        sample_filters(covariance, 3)
