"""A network can use the number of images as a length and compute nothing with it, not even where no run shows it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from espalier.certify import UncertifiableError, certify, lipschitz_bound
from espalier.errors import EspalierError
from espalier.nn import ConvexSum, L2Pool2d, LinearResidual


class Runs(nn.Module):
    """A forward pass given as a function of x."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _caught(x: Tensor) -> Tensor:
    try:
        return x * len(x)
    except Exception:
        return x


def _fits(x: Tensor) -> Tensor:
    try:
        return x.view(3, 3)
    except RuntimeError:
        return 5 * x


def _side_by_side(x: Tensor) -> Tensor:
    return x * x.stride(1)


def _prod(x: Tensor) -> Tensor:
    return x * math.prod(x.shape)


def _converted(x: Tensor) -> Tensor:
    return x * np.float64(x.shape[0])


class Wide(NamedTuple):
    number: Any


COUNTING: dict[str, Callable[[Tensor], Tensor]] = {
    "len": lambda x: x * len(x),
    "numel": lambda x: x / x.numel(),
    "nbytes": lambda x: x / x.nbytes,
    "nelement": lambda x: x / x.nelement(),
    "shape.numel": lambda x: x * x.shape.numel(),
    "prod": _prod,
    "numpy": _converted,
    "plus": lambda x: x + x.shape[0],
    "times": lambda x: x * x.size(0),
    "times its negative axis": lambda x: x * x.size(-2),
    "at its front": lambda x: x.shape[0] * x,
    "power": lambda x: x * 2.0 ** x.shape[0],
    "range": lambda x: x * sum(range(x.shape[0])),
    "bool": lambda x: x if x.shape[0] else 2 * x,
    "greater": lambda x: x if x.shape[0] > 2 else 2 * x,
    "equal": lambda x: x if x.shape[0] == 4 else 2 * x,
    "shapes": lambda x: x if x.shape == (4, 3) else 2 * x,
    "inside": lambda x: x if 3 in x.shape else 2 * x,
    "hash": lambda x: x * (hash(x.shape) % 3),
    "in a dictionary": lambda x: x * {1: 1, 4: 2}.get(x.shape[0], 3),  # type: ignore[call-overload]
    "shift": lambda x: x * (1 << x.shape[0]),
    "list": lambda x: x * sum([1] * x.shape[0]),
    "float": lambda x: x * float(x.shape[0]),
    "square root": lambda x: x / math.sqrt(x.shape[0]),
    "maximum": lambda x: x * max(1, x.shape[0]),
    "formatted": lambda x: x * float(f"{x.shape[0]:d}"),
    "rows": lambda x: x.mul(torch.arange(1, len(x) + 1).view(-1, 1)) if len(x) > 1 else x,
    "arange": lambda x: x + torch.arange(x.shape[0]).view(-1, 1),
    "linspace": lambda x: x + torch.linspace(0, 1, x.shape[0]).view(-1, 1),
    "tensor": lambda x: x * torch.tensor(x.shape[0]),
    "as_tensor": lambda x: x * torch.as_tensor(x.shape[0]),
    "a tensor times it": lambda x: x + torch.ones(3) * x.shape[0],
    "filled with it": lambda x: x + torch.full((3,), x.shape[0]),
    "a sum of ones": lambda x: x * torch.ones(x.shape[0], 1).sum(),
    "a mean over images": lambda x: x - torch.ones(x.shape[0], 3).mean(0),
    "new ones": lambda x: x * x.new_ones(x.shape[0]).sum(),
    "ones like": lambda x: x * torch.ones_like(x).sum(),
    "length of ones": lambda x: x * len(torch.ones(x.shape[0], 1)),
    "cumulated ones": lambda x: x * torch.ones(x.shape[0], 1).cumsum(0),
    "identity": lambda x: torch.eye(x.shape[0], dtype=x.dtype) @ x,
    "channels": lambda x: torch.cat((x[:, : x.shape[0]], x), 1)[:, :3],
    "a channel": lambda x: x + x[:, x.shape[0] - 1 : x.shape[0]],
    "clamped": lambda x: x.clamp(max=x.shape[0]),
    "rolled": lambda x: x.roll(x.shape[0], 1),
    "narrow": lambda x: x + x.narrow(1, 0, x.shape[0]).sum(1, keepdim=True),
    "repeated": lambda x: torch.cat([x.unsqueeze(1).expand(-1, x.shape[0], -1).sum(1), x], 1)[:, :3],
    "expanded": lambda x: x.unsqueeze(1).expand(x.shape[0], x.shape[0], 3).sum(1),
    "viewed": lambda x: x.reshape(-1, 1).expand(-1, x.shape[0]).sum(1).view(-1, 3),
    "a constant's rows": lambda x: x + torch.arange(9.0)[: x.shape[0], None],
    "a constant's row": lambda x: x + torch.arange(9.0)[x.shape[0]],
    "a constant repeated": lambda x: x + torch.arange(3.0).repeat(x.shape[0], 1).sum(),
    "a plain number": lambda x: x.view(4, 3),
    "rolled by a plain number": lambda x: x.roll(4, 0),
    "rolled flat": lambda x: x.roll(12),
    "strides": _side_by_side,
    "mapped": lambda x: torch.func.vmap(lambda row: 3 * row)(x),
    "caught": _caught,
    "fits": _fits,
    "in a tuple": lambda x: x * Wide(x.shape[0]).number,
}


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", COUNTING)
def test_networks_that_compute_with_the_number_of_images_are_refused(kind: str, count: int) -> None:
    images, labels = torch.rand(3, count).T.contiguous(), torch.zeros(count, dtype=torch.long)
    # What they do is in sight, or far off: zero at the images, so that no run of them can tell.
    for net in (
        nn.Sequential(Runs(COUNTING[kind]), nn.Linear(3, 2)),
        nn.Sequential(Runs(lambda x: COUNTING[kind](x - 5).relu()), nn.Linear(3, 2)),
    ):
        with pytest.raises(UncertifiableError):
            certify(net, images, labels)
        with pytest.raises(UncertifiableError):
            lipschitz_bound(net, images)


@pytest.mark.parametrize(
    "read", [lambda n: n.real, lambda n: n.numerator, lambda n: n.conjugate(), lambda n: n.to_bytes(2, "big")[1]]
)
def test_the_number_of_images_is_not_read_by_what_an_integer_has_besides_operators(read: Callable[[int], int]) -> None:
    """It would show in batches alone that are larger than any that is tried."""

    def forward(x: Tensor) -> Tensor:
        return 5 * x if isinstance(x.shape[0], int) and read(x.shape[0]) > 200 else x

    with pytest.raises(UncertifiableError, match="reads the number of images"):
        certify(nn.Sequential(nn.Linear(4, 3), Runs(forward)), torch.rand(4, 4), torch.zeros(4, dtype=torch.long))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_number_of_images_can_be_a_length(count: int) -> None:
    table = torch.tensor([[0.5, -2.0, 1.0]])
    kinds: dict[Callable[[Tensor], Tensor], float] = {
        lambda x: x.view(x.shape[0], -1): 1,
        lambda x: x.reshape(x.size(0), 3, 1).flatten(1): 1,
        lambda x: x.reshape((x.size(-2), *x.shape[1:])): 1,
        lambda x: x.view(x.shape): 1,
        lambda x: x.unsqueeze(1).expand(x.shape[0], 2, 3).sum(1): 2,
        lambda x: x + x.new_zeros(x.shape[0], 1): 1,
        lambda x: x + torch.zeros(x.shape, dtype=x.dtype): 1,
        lambda x: x + torch.zeros_like(x): 1,
        lambda x: x * torch.full_like(x, 3.0): 3,
        lambda x: torch.ones_like(x) * x: 1,
        lambda x: torch.maximum(x, torch.zeros_like(x)): 1,
        lambda x: x + table.to(x).expand(x.shape[0], -1): 1,
        lambda x: torch.cat((x, table.to(x).expand(x.shape[0], -1)), 1)[:, :3]: 1,
        lambda x: torch.cat((x, x.new_full((x.shape[0], 2), 0.5)), 1)[:, 2:]: 1,
        lambda x: x if x.shape == x.clone().shape else 9 * x: 1,
        lambda x: x.view(x.shape[0] * 1, 3): 1,
        lambda x: (x.view if x.is_contiguous() else x.reshape)(x.shape[0] // 1, x.shape[1]): 1,
    }  # fmt: skip
    images = torch.rand(count, 3)
    for kind, constant in kinds.items():
        net = nn.Sequential(Runs(kind), nn.Linear(3, 2))
        with torch.no_grad():
            net[1].weight.copy_(torch.eye(2, 3))
        assert lipschitz_bound(net, images) == pytest.approx(constant, rel=1e-6)
        certificate = certify(net, images, torch.zeros(count, dtype=torch.long))
        with torch.no_grad():
            assert list(certificate.predictions) == net.double()(images.double()).argmax(1).tolist()


@pytest.mark.parametrize("layer", [LinearResidual(4, 3), ConvexSum(nn.Conv2d(4, 4, 3, padding=1)), L2Pool2d(2)])
def test_a_batch_that_is_taken_for_the_channels_of_one_image_is_refused(layer: nn.Module) -> None:
    with pytest.raises(EspalierError):  # by the certificate, or by a layer that is shown other numbers of images
        lipschitz_bound(layer, torch.rand(4, 4, 4))
    assert lipschitz_bound(layer, torch.rand(2, 4, 4, 4)) > 0


def test_a_network_without_numbers_says_what_is_missing() -> None:
    with pytest.raises(UncertifiableError, match="example="):
        lipschitz_bound(nn.Sequential(Runs(lambda x: x.view(x.shape[0], -1)), nn.Linear(3, 2)))
    flat = nn.Linear(3, 2)
    with torch.no_grad():
        flat.weight.fill_(math.nan)
    with pytest.raises(UncertifiableError, match="are its weights finite"):
        lipschitz_bound(flat, torch.rand(2, 3))
