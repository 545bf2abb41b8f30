"""What a layer returns may be changed in place, as networks do everywhere (``nn.ReLU(inplace=True)``)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from espalier import nn as enn
from espalier.models import ConvMixer
from espalier.nn import use_backend
from needs import IMPLEMENTATIONS

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "depthwise": (lambda: enn.DepthwiseConv2d(4, 3), (2, 4, 6, 6)),
    "depthwise, large": (lambda: enn.DepthwiseConv2d(64, 3), (8, 64, 40, 40)),  # in memory that kernels hand out again
    "ConvMixer": (lambda: Features(ConvMixer(16, 2, 3, 2, num_classes=3)), (2, 3, 8, 8)),
    "ConvMixer, a map": (lambda: ConvMixer(16, 2, 3, 2, num_classes=0, global_pool=""), (2, 3, 8, 8)),
    "CayleyConv1d": (lambda: enn.CayleyConv1d(4, 6, 3), (2, 4, 6)),
    "CayleyConv2d": (lambda: enn.CayleyConv2d(4, 6, 3), (2, 4, 6, 6)),
    "CayleyConv2d, zeros": (lambda: enn.CayleyConv2d(4, 6, 3, 2, "zeros"), (2, 4, 6, 6)),
    "CayleyConv2d, one tap": (lambda: enn.CayleyConv2d(4, 6, 1), (2, 4, 6, 6)),
    "CayleyConv2d, by image": (lambda: enn.CayleyConv2d(32, 32, 1), (2, 32, 12, 12)),
    "CayleyConvTranspose2d": (lambda: enn.CayleyConvTranspose2d(4, 6, 3, 2), (2, 4, 6, 6)),
    "CayleyConv3d": (lambda: enn.CayleyConv3d(2, 3, 3), (2, 2, 4, 4, 4)),
    "CayleyLinear": (lambda: enn.CayleyLinear(6, 5), (3, 6)),
    "Mamba1": (lambda: enn.Mamba1(8), (2, 5, 8)),
    "Mamba2": (lambda: enn.Mamba2(8, head_dim=4), (2, 5, 8)),
    "GatedRMSNorm": (lambda: Gated(enn.GatedRMSNorm(8)), (2, 5, 8)),
    "GroupSort": (enn.GroupSort, (2, 4, 6, 6)),
    "Householder": (lambda: enn.Householder(4), (2, 4, 6, 6)),
    "BatchCentering": (lambda: enn.BatchCentering(4), (2, 4, 6, 6)),
    "NormalizedLinear": (lambda: enn.NormalizedLinear(6, 5), (3, 6)),
    "LinearResidual": (lambda: enn.LinearResidual(4), (2, 4, 6, 6)),
    "ConvexSum": (lambda: enn.ConvexSum(nn.Conv2d(4, 4, 1), 0.5), (2, 4, 6, 6)),
}


class Features(nn.Module):
    def __init__(self, net: ConvMixer) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net.forward_features(x)


class Gated(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.norm(x, x.sin()))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("words", LAYERS)
def test_an_output_may_be_changed_in_place(words: str, training: bool, implementation: str) -> None:
    make, shape = LAYERS[words]
    torch.manual_seed(0)
    # Frozen in one of both modes, as there no gradient of a weight is kept.
    layer, x = make().train(training).requires_grad_(training), torch.randn(shape, requires_grad=True)
    kept = x.detach().clone()
    with use_backend(implementation):
        (expected,) = torch.autograd.grad(layer(x).relu().square().sum(), x)
        y = layer(x)
        y.relu_()
        (found,) = torch.autograd.grad(y.square().sum(), x)
        with torch.no_grad():
            layer(x).mul_(0)
    torch.testing.assert_close(found, expected)
    assert torch.equal(x, kept)
