"""Arguments of another kind are refused in one line that names the argument and its value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import nn

from espalier.errors import EspalierError
from espalier.init import structure_
from espalier.init.filters.closed_form import depthwise_covariance_, filter_covariance, sample_filters
from espalier.init.filters.spec import FilterCovariance
from espalier.init.filters.statistics import FilterStatistics, LayerStatistics

# As a caller without a type checker has them.
covariance_of: Callable[..., Any] = filter_covariance
drawn: Callable[..., Any] = sample_filters


def measured(*sigmas: float, k: int = 3) -> FilterStatistics:
    layers = (LayerStatistics(f"at {sigma}", (k, k), filter_covariance(k, sigma), 64, 0.0) for sigma in sigmas)
    return FilterStatistics(tuple(layers))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: covariance_of(7, "1"), "sigma '1'"),
        (lambda: covariance_of(7, None), "sigma None"),
        (lambda: covariance_of(7, 1 + 2j), "sigma (1+2j)"),
        (lambda: covariance_of(7, torch.ones(2)), "sigma tensor"),
        (lambda: covariance_of(7, 1.0, dim=0), "dim is 0"),
        (lambda: covariance_of(7, 1.0, dim=1.5), "dim is 1.5"),
        (lambda: covariance_of(7, 1.0, dtype=torch.int64), "dtype torch.int64"),
        (lambda: covariance_of(7, 1.0, dtype=torch.complex64), "dtype torch.complex64"),
        (lambda: covariance_of(7, 1.0, dtype="float32"), "dtype 'float32'"),
        (lambda: covariance_of(7, 1.0, variant=None), "unknown variant 'None'"),
        (lambda: covariance_of(7, 1.0, scale=None), "unknown scale 'None'"),
        (lambda: drawn(torch.eye(9), -1), "count is -1"),
        (lambda: drawn(torch.eye(9), 2.5), "count is 2.5"),
        (lambda: drawn(torch.eye(9), True), "count is True"),
        (lambda: drawn(torch.eye(9), 3, dtype=torch.int64), "dtype torch.int64"),
        (lambda: drawn([[1.0]], 3), "covariance is a list"),
        (lambda: depthwise_covariance_(torch.zeros(3, 1, 7, 7).numpy(), 1.0), "weight is a ndarray"),
        (lambda: FilterCovariance().sigma_at("a"), "depth 'a'"),  # type: ignore[arg-type]
    ],
)
def test_arguments_of_the_closed_form(call: Callable[[], object], words: str) -> None:
    refused(call, words)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s: s.resample(depth=2.5), "depth is 2.5"),
        (lambda s: s.resample(depth=True), "depth is True"),
        (lambda s: s.resample(depth="3"), "depth is '3'"),
        (lambda s: s.layer_at("a"), "depth 'a'"),
        (lambda s: s.covariance_at(None), "depth None"),
        (lambda s: s.layer_at(0.5, (2, 2)), "kernel_size (2, 2)"),
        (lambda s: s.layer_at(0.5, (0, 0)), "kernel_size (0, 0)"),
        (lambda s: s.layer_at(0.5, (3, 3, 3)), "number of axes"),
        (lambda s: s.shrink(None), "toward is None"),
        (lambda s: s.shrink(0.5), "toward is 0.5"),
        (lambda s: s.shrink(strength=None), "strength None"),
        (lambda s: s.shrink(strength=[0.5]), "strength [0.5]"),
        (lambda s: FilterStatistics(()), "layers is ()"),
        (lambda s: FilterStatistics((1,)), "layers is (1,)"),
        (lambda s: FilterStatistics.from_model(None), "models is None"),
        (lambda s: FilterStatistics.from_model([nn.Linear(2, 2), "net"]), "models holds a str"),
    ],
)
def test_arguments_of_statistics(call: Callable[[Any], object], words: str) -> None:
    refused(lambda: call(measured(0.3, 1.0)), words)


def refused(call: Callable[[], object], words: str) -> None:
    with pytest.raises(EspalierError) as caught:
        call()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_numbers_of_other_types_are_numbers() -> None:
    expected = filter_covariance(5, 2.0)
    assert torch.equal(covariance_of(5, torch.tensor(2.0, dtype=torch.float64)), expected)
    assert torch.equal(covariance_of(5, 2), expected)
    assert sample_filters(expected, 0).shape == (0, 25)
    statistics = measured(0.3, 1.0)
    for kernel in (5, [5, 5], (5, 5)):
        assert statistics.layer_at(0.5, kernel).kernel_size == (5, 5)


@pytest.mark.parametrize(
    "given",
    [{"preset": "patch-1"}, {"sigma0": 1.0}, {"v": 0.0}, {"a": 0.0}, {"sigma_is_std": True}, {"wrap": True},
     {"wrap": False}, {"mask": "y"}, {"variant": "psd"}, {"scale": "unit"}],
)  # fmt: skip
def test_what_statistics_do_not_read_is_refused_beside_them(given: dict[str, Any]) -> None:
    [name] = given
    refused(lambda: FilterCovariance(statistics=measured(0.3), **given), f"{name} is {given[name]!r}, but statistics")


def test_every_field_beside_statistics_is_read_or_refused() -> None:
    other: dict[str, Any] = {
        "preset": "patch-1", "sigma0": 1.0, "v": 0.5, "a": 0.5, "sigma_is_std": True, "wrap": False, "mask": "y",
        "centre": "last", "variant": "abs", "scale": "unit", "depth_rule": "stops",
    }  # fmt: skip
    assert other.keys() == {field.name for field in fields(FilterCovariance)} - {"statistics"}
    statistics = FilterStatistics(tuple(replace(part, centre="middle") for part in measured(0.3, 1.0, 2.0).layers))
    plain = FilterCovariance(statistics=statistics)
    for name, value in other.items():
        try:
            spec = FilterCovariance(statistics=statistics, **{name: value})
            drawn_from = spec.covariance(3, spec.depth_of(0, 3))
        except EspalierError:
            continue
        assert not torch.equal(drawn_from, plain.covariance(3, plain.depth_of(0, 3))), name


@pytest.mark.parametrize("given", ["stats.safetensors", {}, measured(0.3).layers])
def test_statistics_of_another_type_are_refused(given: Any) -> None:
    refused(lambda: FilterCovariance(statistics=given), "FilterStatistics.load(path)")


class Causal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.Conv1d(64, 64, 5, padding=4, groups=64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.filters(x)[..., : x.shape[-1]]


def plain() -> nn.Sequential:
    return nn.Sequential(*(nn.Conv1d(64, 64, 5, padding=2, groups=64) for _ in range(2)))


def test_filters_about_one_tap_do_not_go_where_they_are_about_another() -> None:
    causal = nn.Sequential(Causal(), Causal())
    for source, target in ((causal, plain()), (plain(), causal)):
        spec = FilterCovariance(statistics=FilterStatistics.from_model(source))
        before = [weight.clone() for weight in target.parameters()]
        refused(lambda: structure_(target, depthwise=spec), "measure a network whose layers are")  # noqa: B023
        assert all(torch.equal(a, b) for a, b in zip(before, target.parameters(), strict=True))
        assert {row.status for row in structure_(source, depthwise=spec).layers} == {"written"}
    # Files from before the tap was kept do not say it, and the row does.
    unknown = FilterStatistics(
        tuple(replace(part, centre=None) for part in FilterStatistics.from_model(plain()).layers)
    )
    for row in structure_(causal, depthwise=FilterCovariance(statistics=unknown)).layers:
        assert "about a tap that they do not name" in row.asked


def test_causal_filters_shrink_toward_the_causal_closed_form() -> None:
    form = filter_covariance(7, 2.0, dim=1, centre="last")
    layer = LayerStatistics("a", (7,), 3 * form, 64, 0.0, centre="last")
    shrunk = FilterStatistics((layer,)).shrink(strength=1.0).layers[0].covariance
    assert (shrunk - 3 * form).norm() < 0.15 * (3 * form).norm()
