"""Certificates of reflections, norms of blocks, linear residuals and centring: bounds, rounding, attacks."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from espalier.certify import UncertifiableError, certify, lipschitz_bound
from espalier.nn import Abs, BatchCentering, Householder, L2Pool2d, LinearResidual
from experiments.adversarial_models import attack


def net_with(part: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 1), part, nn.Flatten(), nn.LazyLinear(3)).eval()
    net(torch.rand(1, 2, 4, 4))
    for name, tensor in [*part.named_parameters(), *part.named_buffers()]:
        if name in ("theta", "running_mean"):
            with torch.no_grad():
                tensor.copy_(torch.randn(tensor.shape))
    return net


PARTS = [Abs(), Householder(4), L2Pool2d(2), LinearResidual(4), BatchCentering(4)]


@pytest.mark.parametrize("arithmetic", ["float64", "float32"])
@pytest.mark.parametrize("part", PARTS, ids=lambda part: type(part).__name__)
def test_certified_images_hold_and_rounding_stays_below_its_bound(part: nn.Module, arithmetic: str) -> None:
    net, dtype = net_with(part), getattr(torch, arithmetic)
    x = torch.rand(8, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = net(x).argmax(1)
    certificate = certify(net, x, labels, arithmetic=arithmetic)
    assert min(certificate.radii) > 0
    constant = part.lipschitz_constant() if isinstance(part, LinearResidual) else 1.0
    assert certificate.lipschitz == pytest.approx(lipschitz_bound(net[0]) * constant, rel=1e-5)
    assert attack(net, x, labels, certificate.radii, dtype, 0).violations == 0
    if dtype == torch.float32:
        exact, ran = (copy.deepcopy(net).to(kind)(x.to(kind)).double() for kind in (torch.float64, torch.float32))
        assert (exact - ran).abs().max().item() <= certificate.rounding


@pytest.mark.parametrize("part", PARTS, ids=lambda part: type(part).__name__)
def test_a_constant_needs_no_image_size(part: nn.Module) -> None:
    assert lipschitz_bound(part.eval()) == pytest.approx(lipschitz_bound(part, torch.rand(1, 4, 4, 4)))


def test_centring_is_refused_in_training_mode() -> None:
    for images in (None, torch.rand(2, 4, 3, 3)):
        with pytest.raises(UncertifiableError, match=r"training mode|images would meet"):
            lipschitz_bound(BatchCentering(4).train(), images)


def test_squares_that_overflow_or_vanish_cost_the_radius() -> None:
    head = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0], [-1.0]]))
    for scale in (1e20, 1e-24):  # squares of float32 end at 1e38, and begin at 1e-38
        first = nn.Conv2d(1, 1, 1, bias=False)
        nn.init.constant_(first.weight, scale)
        net = nn.Sequential(first, L2Pool2d(2), nn.Flatten(), head)
        radii = [certify(net, torch.ones(1, 1, 2, 2), torch.zeros(1, dtype=torch.long), arithmetic=kind).radii[0]
                 for kind in ("float32", "float64")]  # fmt: skip
        assert radii[0] == 0.0
        assert radii[1] == pytest.approx(2.0, rel=1e-6)


def test_angles_that_are_not_finite_are_refused() -> None:
    part = Householder(4)
    nn.init.constant_(part.theta, math.inf)
    with pytest.raises(UncertifiableError, match="angles"):
        lipschitz_bound(part)
