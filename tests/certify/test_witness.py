"""A network that does something else for users than while it is bounded is refused, also where that shows nowhere."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from espalier.certify import UncertifiableError, certify, lipschitz_bound
from espalier.nn import CayleyConv2d, CayleyLinear, GroupSort, MaxMin, NormalizedLinear
from tests.certify.test_trail import Runs, far


def steep(x: Tensor, yes: Any = True) -> Tensor:
    """Return x, with a slope of 1000 far from pixels if told so."""
    return x + (999 * far(x) if yes else far(x))


def hidden_from_modes(x: Tensor) -> Tensor:
    y = x + far(x)
    if type(x) is Tensor:
        with torch._C.DisableTorchFunction():
            y.add_(999 * (x - 5).relu())
    return y


def through_memory(x: Tensor) -> Tensor:
    y = x + far(x)
    if type(x) is Tensor and not x.requires_grad:
        numbers = (ctypes.c_double * 1).from_address(y.data_ptr())
        numbers[0] += 999 * max(numbers[0] - 5, 0)
    return y


def through_numpy(x: Tensor) -> Tensor:
    y = x + far(x)
    if type(x) is Tensor and not x.requires_grad:
        numbers = y.numpy()
        numbers += 999 * (numbers - 5).clip(0)
    return y


def in_a_thread(x: Tensor) -> Tensor:
    made = []
    thread = threading.Thread(target=lambda: made.append(steep(x, type(x) is Tensor)))
    thread.start()
    thread.join()
    return made[0]


def caught(x: Tensor) -> Tensor:
    try:
        return steep(x, hash(x.shape[0]) and type(x) is Tensor)
    except TypeError:
        return steep(x, False)


def caught_refusal(x: Tensor) -> Tensor:
    try:
        return x + 999 * far(x) if type(x) is Tensor else x + far(x)
    except UncertifiableError:
        return x + far(x)


def names_one_tensor(x: Tensor) -> Tensor:
    y = F.dropout(x, 0.5, False)
    return steep(x, y is x)


def by_leaf(x: Tensor) -> Tensor:
    return steep(x, not x.is_leaf)


def other_constant(x: Tensor) -> Tensor:
    return x + (999.0 if torch.is_grad_enabled() else 1.0) * far(x)


def other_operands(x: Tensor) -> Tensor:
    a, b = x + far(x), x + far(3 * x)
    return a if not torch.is_grad_enabled() else b


def other_order(x: Tensor) -> Tensor:
    a, b = far(x), 3 * x
    return b - a if torch.is_grad_enabled() else a - b


def count_as_constant(x: Tensor) -> Tensor:
    return x + far(x) * torch.ones(len(x.shape), 1)[:1] if isinstance(x.shape[0], int) else x + far(x)


def written_without_gradients(x: Tensor) -> Tensor:
    y = x + far(x)
    if x.requires_grad:
        with torch.no_grad():
            y.mul_(1 + far(x))
    return y


DOES_SOMETHING_ELSE: dict[str, Callable[[Tensor], Tensor]] = {
    "type": lambda x: steep(x, type(x) is Tensor),
    "class name": lambda x: steep(x, type(x).__name__ == "Tensor"),
    "gradients on": lambda x: steep(x, torch.is_grad_enabled()),
    "requires_grad": lambda x: steep(x, x.requires_grad),
    "grad_fn": lambda x: steep(x, x.grad_fn is not None),
    "grad_fn of a result": lambda x: steep(x, (2 * x).grad_fn is not None),
    "leaf": by_leaf,
    "inference mode": lambda x: steep(x, torch.is_inference_mode_enabled()),
    "inference tensor": lambda x: steep(x, x.is_inference()),
    "text of the shape": lambda x: steep(x, "N" not in str(x.shape)),
    "text of the count": lambda x: steep(x, str(x.shape[0]).isdigit()),
    "type of the count": lambda x: steep(x, isinstance(x.shape[0], int)),
    "hash of the count": caught,
    "text of the tensor": lambda x: steep(x, "Bounded" not in type(x).__repr__(x) if type(x) is not Tensor else True),
    "attributes": lambda x: steep(x, not hasattr(x, "bound")),
    "names": names_one_tensor,
    "a constant": other_constant,
    "operands": other_operands,
    "order": other_order,
    "a constant of another size": count_as_constant,
    "hidden from modes": hidden_from_modes,
    "memory": through_memory,
    "numpy": through_numpy,
    "a thread": in_a_thread,
    "caught refusal": caught_refusal,
    "a change in place": written_without_gradients,
}  # fmt: skip


@pytest.mark.parametrize("images", [1, 4])
@pytest.mark.parametrize("kind", DOES_SOMETHING_ELSE)
def test_a_network_that_does_something_else_for_users_is_refused(kind: str, images: int) -> None:
    function = DOES_SOMETHING_ELSE[kind]
    net = nn.Sequential(Runs(lambda net, x: function(x)), nn.Linear(3, 2)).eval()
    x = torch.rand(images, 3)
    with pytest.raises(UncertifiableError):
        certify(net, x, torch.zeros(images, dtype=torch.long))
    with pytest.raises(UncertifiableError):
        lipschitz_bound(net, x)


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


def parametrised() -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))


HONEST: dict[str, Callable[[], nn.Module]] = {
    "questions": Residual,
    "constants of every image": Shown,
    "layers": lambda: nn.Sequential(CayleyLinear(3, 4), MaxMin(), NormalizedLinear(4, 3), GroupSort(3), nn.Dropout()),
    "parametrised": parametrised,
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
