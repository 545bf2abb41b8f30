"""A network that does the same for users as while it is bounded is certified, whatever it asks on the way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from espalier.certify import certify
from espalier.nn import CayleyConv2d, CayleyLinear, GroupSort, MaxMin, NormalizedLinear


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.scale = nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.Parameter(torch.rand(3))

    def forward(self, x: Tensor) -> Tensor:
        y = x.contiguous()  # the same tensor to torch, another value here
        y = checkpoint(self.body, y, use_reentrant=False) + x
        if x.requires_grad and y.grad_fn is None:  # asks, but does the same
            return y * self.scale.abs()
        return y * self.scale.abs()


class Shown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        made = torch.zeros(x.shape[0], 2)
        made = torch.cat([x, made.to(x), x.new_ones(x.shape[0], 1)], dim=1)
        made += F.pad(x, (0, 3))
        rows = [row.clone() for row in made.unbind(1)]
        rows[0].mul_(0.5).mul_(x.new_full((1,), 3.0))
        return torch.stack(rows, 1).reshape(x.shape[0], -1)


class Class(nn.Module):
    """A token before the others, and what gradients are watched with."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.places = nn.Parameter(torch.rand(1, 1, 3)), nn.Parameter(torch.rand(1, 2, 3))
        self.head = nn.Linear(3, 3)
        self.head.register_full_backward_hook(lambda module, into, out: None)

    def forward(self, x: Tensor) -> Tensor:
        token = self.token.expand(x.shape[0], -1, -1) + self.places[:, :1]
        x = torch.cat([token.to(x), torch.as_tensor(x)[:, None] + self.places[:, 1:]], 1)
        x = x.clone() if x.requires_grad else x
        x = F.relu(x, inplace=not x.requires_grad)
        x = x * 2.0 if torch.is_grad_enabled() else x.mul_(2.0)
        x = x.view(x.shape[0], 6) if x.is_contiguous() else x.reshape(x.shape[0], 6)
        y = self.head(x[:, :3]) + torch.zeros(x.shape[0], 1, dtype=x.dtype) @ self.places[0, :1]
        if y.requires_grad:
            y.register_hook(lambda grad: grad)
        return torch.cat([y, x], 1)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.start = nn.GRU(3, 3, batch_first=True), nn.Parameter(torch.rand(1, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cell(self.start)[0][0, -1]


class Spectral(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / torch.linalg.matrix_norm(weight, 2)


def normalised() -> nn.Module:
    layer = nn.Linear(64, 64)
    nn.utils.parametrize.register_parametrization(layer, "weight", Spectral())
    return nn.Sequential(nn.Linear(3, 64), layer)


def parametrised() -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))


HONEST: dict[str, Callable[[], nn.Module]] = {
    "questions": Residual,
    "constants of every image": Shown,
    "layers": lambda: nn.Sequential(CayleyLinear(3, 4), MaxMin(), NormalizedLinear(4, 3), GroupSort(3), nn.Dropout()),
    "parametrised": parametrised,
    "a class token": Class,
    "by the spectral norm": normalised,
    "recurrent constants": Recurrent,
    "convolutions": lambda: nn.Sequential(
        nn.Unflatten(1, (3, 1, 1)), CayleyConv2d(3, 3, 1), nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
    ),
}  # fmt: skip


@pytest.mark.parametrize("images", [1, 4, 5])
@pytest.mark.parametrize("kind", HONEST)
def test_a_network_that_does_the_same_for_users_is_certified(kind: str, images: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(HONEST[kind](), nn.Flatten()).eval()
    x = torch.rand(images, 3)
    found = certify(net, x, net(x).argmax(1))
    assert max(found.radii) > 0


def test_images_are_left_alone_by_every_pass() -> None:
    net = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2)).eval()
    x = torch.rand(4, 3)
    before = x.clone()
    certify(net, x, torch.zeros(4, dtype=torch.long))
    assert torch.equal(x, before)
