"""Covariance-structured filters beyond ConvMixer (transformers' ConvNeXt) and beyond two axes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import espalier
from espalier.init import FilterCovariance, depthwise_layers, filter_covariance
from espalier.models import ConvMixer


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def second_moment_error(filters_HK: Tensor, covariance_KK: Tensor) -> float:
    """Distance of the filters' second moment from a covariance, over the root of its expected square."""
    count = len(filters_HK)
    expected = math.sqrt((covariance_KK.trace() ** 2 + covariance_KK.square().sum()).item() / count)
    return (filters_HK.mT @ filters_HK / count - covariance_KK).norm().item() / expected


def responses(module: nn.Module) -> Tensor:
    """Read a depthwise layer's filters off its own forward pass: what single pixels are turned into, (h, K)."""
    k, h = module.kernel_size[0], module.in_channels
    out = module(torch.nn.functional.pad(torch.ones(1, h, 1, 1), (k - 1,) * 4)) - module.bias.view(-1, 1, 1)
    middle = slice(k // 2, k // 2 + k)
    # A correlation answers an impulse with the mirrored kernel.
    return out[0, :, middle, middle].flip(-1, -2).flatten(1).detach().double()


@pytest.fixture
def convnext() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ConvNextConfig(
        hidden_sizes=[256, 320], depths=[1, 2], num_stages=2, image_size=32, patch_size=4, num_labels=3
    )
    return transformers.ConvNextForImageClassification(config).eval()


@pytest.mark.parametrize("variant", ["clip", "psd"])
def test_transformers_convnext_applies_the_filters_that_were_asked_for(convnext: nn.Module, variant: str) -> None:
    spec = FilterCovariance("convnext", variant=variant)
    before = {name: tensor.clone() for name, tensor in convnext.state_dict().items()}
    assert [row.status for row in espalier.audit(convnext).layers] == ["absent"] * 3
    report = espalier.structure_(convnext, depthwise=spec, generator=seeded())
    assert [row.status for row in report.layers] == ["written"] * 3
    layers = depthwise_layers(convnext)
    for index, (name, module) in enumerate(layers):
        filters = responses(module)
        torch.testing.assert_close(filters, module.weight.detach().flatten(1).double(), atol=1e-6, rtol=1e-5)
        assert second_moment_error(filters, spec.covariance(7, index / 2)) < 4.5, name
    written = {f"{name}.weight" for name, _ in layers}
    changed = {name for name, tensor in convnext.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == written
    assert torch.isfinite(convnext(torch.randn(2, 3, 32, 32, generator=seeded())).logits).all()
    assert [row.status for row in espalier.audit(convnext, against=report).layers] == ["present"] * 3


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.sampled_from([(3,), (8,), (15,), (4, 7), (3, 3, 3), (5, 3, 4), (5, 5, 5)]),
    sigma=st.floats(0.05, 25.0),
    centre=st.sampled_from(["middle", "last"]),
)
def test_psd_variant_needs_no_repair_on_any_number_of_axes(sizes: tuple[int, ...], sigma: float, centre: str) -> None:
    covariance = filter_covariance(sizes, sigma, variant="psd", centre=centre)
    eigenvalues = torch.linalg.eigvalsh(covariance)
    assert eigenvalues[0] >= -1e-12 * eigenvalues[-1]
    clipped = filter_covariance(sizes, sigma, wrap=False, centre=centre)
    # The diagonal is the published one, to which clipping only adds.
    assert (clipped.diagonal() - covariance.diagonal()).min() >= -1e-12


@pytest.mark.parametrize("dim", [1, 3])
def test_the_closed_form_over_an_axis_of_one_tap_is_that_of_the_others(dim: int) -> None:
    line = filter_covariance(7, 1.3, dim=1)
    flat = {1: (7, 1), 3: (1, 7, 1)}[dim]
    torch.testing.assert_close(filter_covariance(flat, 1.3), line, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("spatial_dims", "kernel"), [(1, 9), (3, 3)])
def test_structure_on_lines_and_volumes(spatial_dims: int, kernel: int) -> None:
    net = ConvMixer(300, 2, kernel_size=kernel, patch_size=2, in_chans=2, num_classes=3, spatial_dims=spatial_dims)
    report = espalier.structure_(net, depthwise=FilterCovariance(sigma0=0.5, v=0.0, a=0.0), generator=seeded())
    assert [row.status for row in report.layers] == ["written"] * 2
    for _, module in depthwise_layers(net):
        filters = module.weight.detach().flatten(1).double()
        assert second_moment_error(filters, filter_covariance(kernel, 0.5, dim=spatial_dims)) < 4.5
    assert net(torch.randn(2, 2, *(6,) * spatial_dims, generator=seeded())).shape == (2, 3)
