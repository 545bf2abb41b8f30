"""Which depthwise layers a model has, at what depth, is the same to all that measure, write, fit and freeze them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from espalier.init.filters.statistics import FilterStatistics


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
