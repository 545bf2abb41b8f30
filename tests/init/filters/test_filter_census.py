"""Which depthwise layers a model has, at what depth, is the same to all that measure, write, fit and freeze them."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from espalier.init import (
    FilterCovariance,
    FilterStatistics,
    StructureFit,
    depthwise_covariance_,
    depthwise_layers,
    fit,
    structure_,
)
from espalier.recipes import get_recipe
from espalier.train.build import freeze_


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def filters(width: int = 16, kernel: int = 5, *, seed: int = 0) -> nn.Conv2d:
    conv = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
    conv.weight.data.copy_(torch.randn(conv.weight.shape, generator=seeded(seed)))
    return conv


def states(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, parametrizations.weight_norm])
def test_measuring_leaves_the_model_as_it_was(norm: object, training: bool) -> None:
    model = nn.Sequential(norm(filters()), filters(seed=1)).train(training)  # type: ignore[operator]
    before = states(model)
    first = FilterStatistics.from_model(model)
    again = FilterStatistics.from_model(copy.deepcopy(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {part.training for part in model.modules()} == {training}
    # What the network computes with in evaluation, where nothing moves.
    expected = torch.cov(copy.deepcopy(model).eval()[0].weight.detach().flatten(1).double().mT)
    for measured in (first, again):
        torch.testing.assert_close(measured.layers[0].covariance, expected, rtol=0, atol=1e-12)


# A layer's kernel, and what is special about it.
PARTS = st.lists(
    st.tuples(
        st.sampled_from([5, 7]), st.sampled_from(["", "", "", "times 2", "2 taps", "frozen", "computed", "tied"])
    ),
    min_size=1,
    max_size=7,
)


def generated(parts: list[tuple[int, str]], seed: int) -> nn.Sequential:
    """A net of depthwise layers, some of which cannot be written, with filters of a wide range of sigma."""
    net, g = nn.Sequential(nn.Conv2d(3, 64, 3)), seeded(seed)
    for kernel, special in parts:
        k, count = (2, 1) if special == "2 taps" else (kernel, 2 if special == "times 2" else 1)
        conv = nn.Conv2d(64, 64 * count, k, padding=k // 2, groups=64)
        weights = [part.weight for part in net if isinstance(part.weight, nn.Parameter)]
        twins = [weight for weight in weights if weight.shape == conv.weight.shape]
        if special == "tied" and twins:
            conv.weight = twins[-1]
        elif special != "2 taps":
            sigma = 0.2 * 20 ** float(torch.rand((), generator=g))
            depthwise_covariance_(conv.weight, sigma, generator=g)
        if special == "frozen":
            conv.requires_grad_(False)
        net.append(parametrizations.weight_norm(conv) if special == "computed" else conv)
    return net


@settings(max_examples=12, deadline=None)
@given(parts=PARTS, seed=st.integers(0, 2**31))
@example(parts=[(7, "times 2"), (7, ""), (7, ""), (7, "")], seed=0)
@example(parts=[(7, "2 taps"), (7, ""), (7, ""), (7, "2 taps"), (7, "")], seed=0)
def test_statistics_of_a_net_give_each_layer_its_own_covariance(parts: list[tuple[int, str]], seed: int) -> None:
    parts = [*parts, (7, "")]  # one that is written, whatever the others are
    net = generated(parts, seed)
    statistics = FilterStatistics.from_model(net)
    measured = {layer.name: layer.covariance for layer in statistics.layers}
    copied = copy.deepcopy(net)
    report = structure_(copied, depthwise=FilterCovariance(statistics=statistics), generator=seeded(1))
    assert [row.layer for row in report.layers] == [name for name, _ in depthwise_layers(net)]
    for row, depth in zip(report.layers, even(len(report.layers)), strict=True):
        if row.status == "written":
            conv = net.get_submodule(row.layer)
            own = torch.cov(conv.weight.detach().flatten(1).double().mT)
            torch.testing.assert_close(measured[row.layer], own, rtol=0, atol=1e-12)
            torch.testing.assert_close(statistics.covariance_at(depth, conv.kernel_size), own, rtol=0, atol=1e-12)
            assert row.asked == f"statistics at depth {depth:.2f}"
    for row in report.layers:
        special = parts[int(row.layer) - 1][1]
        assert (row.status == "written") or special in ("times 2", "2 taps", "frozen", "computed", "tied")


@settings(max_examples=8, deadline=None)
@given(parts=PARTS, seed=st.integers(0, 2**31))
@example(parts=[(7, "times 2"), (7, ""), (7, ""), (7, "")], seed=0)
@example(parts=[(7, "2 taps"), (7, ""), (7, ""), (7, "2 taps"), (7, "")], seed=0)
def test_a_fit_is_of_the_depth_at_which_each_layer_was_measured(parts: list[tuple[int, str]], seed: int) -> None:
    net = generated(parts, seed)
    depths = dict(zip([name for name, _ in depthwise_layers(net)], even(len(parts)), strict=True))
    for name, conv in net.named_children():
        if name in depths and not isinstance(conv.weight, nn.Parameter):
            continue
        if name in depths and 2 not in conv.kernel_size:
            # A parabola over depth, so that a fit of it has nothing to approximate.
            depthwise_covariance_(conv.weight, 0.4 + 2 * depths[name] ** 2, generator=seeded(seed % 1000))
    assume(any(special in ("", "frozen", "tied") for _, special in parts))
    found = fit(net)
    kept = StructureFit.from_dict(json.loads(json.dumps(found.to_dict())))
    assert kept == found
    rows, spec = found.rows["depthwise"], found.specs()["depthwise"]
    for row in rows:
        assert spec.depth_of(*row.place) == depths[row.layer]
    # The same least squares as those of numpy, over the depths at which structure_ will ask.
    known, sigmas = [depths[row.layer] for row in rows], [row.sigma for row in rows]
    curve = np.polynomial.Polynomial.fit(known, sigmas, min(len(rows), 3) - 1, domain=[0, 1], window=[0, 1])
    if min(curve(np.linspace(0, 1, 101))) > 0:
        assert [spec.sigma_at(depth) for depth in known] == pytest.approx([float(curve(d)) for d in known], rel=1e-6)


def even(count: int) -> list[float]:
    return [index / (count - 1) for index in range(count)] if count > 1 else [0.5]


def test_a_rising_curve_survives_where_it_would_fall_to_zero_before_the_first_layer() -> None:
    net = generated([(7, "2 taps"), (7, ""), (7, ""), (7, "2 taps"), (7, "")], 0)
    for index, sigma in ((2, 0.3), (3, 1.0), (5, 3.0)):
        depthwise_covariance_(net[index].weight, sigma, generator=seeded())
    spec = fit(net).specs()["depthwise"]
    for depth, sigma in ((0.25, 0.3), (0.5, 1.0), (1.0, 3.0)):
        assert spec.sigma_at(depth) == pytest.approx(sigma, rel=0.35)
    assert min(spec.sigma_at(depth / 100) for depth in range(101)) > 0.1


def test_records_without_places_mean_what_they_meant() -> None:
    rows = [{"layer": str(i), "sigma": 0.5 + i, "error": 0.1, "white_error": 0.9} for i in range(3)]
    spec = StructureFit.from_dict({"depthwise": rows}).specs()["depthwise"]
    assert [spec.sigma_at(d) for d in (0, 0.5, 1)] == pytest.approx([0.5, 1.5, 2.5])
    for place in ([3, 3], [-1, 2], [0], [0.5, 2], "ab", [True, 2]):
        with pytest.raises((TypeError, ValueError)):
            StructureFit.from_dict({"depthwise": [rows[0] | {"place": place}]})


def test_places_and_centres_outlive_a_file(tmp_path: Path) -> None:
    net = generated([(7, "times 2"), (7, ""), (5, "")], 0)
    for model, form in ((net, 2), (net[2:], 1)):
        measured = FilterStatistics.from_model(model)
        path = measured.save(tmp_path / f"{form}.safetensors")
        assert f"espalier.filter_statistics/{form}".encode() in path.read_bytes()
        read = FilterStatistics.load(path)
        assert read.depths == measured.depths == ((0.5, 1.0) if form == 2 else (0.0, 1.0))
        assert [layer.centre for layer in read.layers] == ["middle", "middle"]
    # Between two, in proportion to their distance in depth; before the first, the first.
    first, second = FilterStatistics.load(tmp_path / "2.safetensors").layers
    statistics = FilterStatistics((first, second)).resample(7)
    torch.testing.assert_close(statistics.covariance_at(0.25), first.covariance)
    mixed = 0.4 * first.covariance + 0.6 * second.resize((7, 7)).covariance
    torch.testing.assert_close(statistics.covariance_at(0.8), mixed)


class Positions(nn.Module):
    """Attention with positions from a depthwise convolution of its values (LePE)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.get_v = filters(dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c)
        side = int(n**0.5)
        if side * side == n:
            plane = v.transpose(1, 2).reshape(b, n, c).mT.reshape(b, c, side, side)
            y = y + self.get_v(plane).flatten(2).mT
        return self.proj(y)


def test_filters_inside_attention_that_is_written_are_layers_of_their_own() -> None:
    model = nn.Sequential(Positions(64, 4), filters(64), Positions(64, 4))
    statistics = FilterStatistics.from_model(model)
    expected = [("0", "attention"), ("0.get_v", "depthwise"), ("1", "depthwise"), ("2", "attention")]
    expected.append(("2.get_v", "depthwise"))
    written = structure_(model, depthwise=FilterCovariance(statistics=statistics), generator=seeded())
    assert [(row.layer, row.kind) for row in written.layers] == expected
    assert {row.status for row in written.layers} == {"written"}
    assert [row.asked[-4:] for row in written.layers if row.kind == "depthwise"] == ["0.00", "0.50", "1.00"]
    assert [layer.name for layer in statistics.layers] == [row.layer for row in fit(model).rows["depthwise"]]


class Residual(Positions):
    """Attention with a convolution of its values over the tokens beside it, as a kernel of one column."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads)
        self.get_v = nn.Conv2d(heads, heads, (9, 1), padding=(4, 0), groups=heads, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v) + self.get_v(v)
        return self.proj(y.transpose(1, 2).reshape(b, n, c))


def test_filters_over_time_inside_attention_that_is_written_are_its_own() -> None:
    model = nn.Sequential(Residual(64, 4), filters(64))
    before = model[0].get_v.weight.detach().clone()
    written = structure_(model, generator=seeded())
    assert [(row.layer, row.kind, row.status) for row in written.layers] == [
        ("0", "attention", "written"), ("1", "depthwise", "written"),
    ]  # fmt: skip
    assert torch.equal(model[0].get_v.weight, before)


def test_all_filters_that_have_a_row_are_frozen_and_nothing_else() -> None:
    model = generated([(7, "times 2"), (5, ""), (7, "2 taps"), (5, "computed")], 0)
    freeze_(model, replace(get_recipe("convmixer_filters"), freeze="depthwise"))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"0.weight", *(f"{index}.bias" for index in range(5))}
