"""Parts of the networks of ``adversarial_models.py`` that reach past their input, or are set to what no class makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from espalier import nn as enn


class Step(nn.Module):
    """A function of the input and of what other steps left behind."""

    def __init__(self, function: Callable[[Tensor, dict[str, Any]], Tensor], left: dict[str, Any]) -> None:
        super().__init__()
        self.function, self.left = function, left

    def forward(self, x: Tensor) -> Tensor:
        """Return what the function makes of both."""
        return self.function(x, self.left)


def _keep(x: Tensor, left: dict[str, Any]) -> Tensor:
    left["x"] = x
    return 0.05 * x


def _keep_far(x: Tensor, left: dict[str, Any]) -> Tensor:
    left["x"] = 50 * (x - 1).relu()
    return x


def _shrink(x: Tensor, left: dict[str, Any]) -> Tensor:
    left["x"].mul_(0.1)
    return x.relu()


def _leave(x: Tensor, left: dict[str, Any]) -> Tensor:
    left["x"] = 5 * x
    return x


def _by_precision(x: Tensor, left: dict[str, Any]) -> Tensor:
    y = x.float() if x.dtype == torch.float64 else x.double()
    return (20 * y if y.dtype == torch.float32 else y).to(x.dtype)


def _flip(x: Tensor, left: dict[str, Any]) -> Tensor:
    left["loud"] = not left.get("loud", True)
    return 20 * x if left["loud"] else x


Remembered = tuple[Callable[..., Tensor] | None, Callable[..., Tensor], Callable[..., Tensor] | None]
PAST: dict[str, Remembered] = {
    "returns what was there before": (_keep, lambda x, left: left["x"], None),
    "changes what was there before": (_keep_far, _shrink, lambda x, left: x + left["x"]),
    "leaves something": (None, _leave, lambda x, left: x + left["x"]),
    "asks its precision": (None, _by_precision, None),
    "is another one at every call": (None, _flip, None),
    "changes its input": (None, lambda x, left: x.mul_(4.0), None),
}
"""By what the module inside a residual does: it, and what runs before and after."""


def past_its_input(kind: str) -> nn.Module:
    """Return a residual whose constant is stated by that of the module inside, which is no map of its input alone."""
    left: dict[str, Any] = {}
    before, inside, after = (Step(function, left) if function else None for function in PAST[kind])
    assert inside is not None
    parts = (before, enn.ConvexSum(inside, 0.6), after)
    return nn.Sequential(*(part for part in parts if part is not None))


class Steep(float):
    """A number that says of its size that it is 1."""

    def __abs__(self) -> float:
        """Return 1."""
        return 1.0


class Loose(int):
    """A number that says of its size that it is 8."""

    def __abs__(self) -> int:
        """Return 8."""
        return 8


class Odd(nn.Module):
    """A layer, or an operation, that was set to something that its constructor never sets."""

    KINDS: ClassVar = ("pairs", "factor", "slope", "divisor", "sum", "part")

    def __init__(self, kind: str, channels: int) -> None:
        super().__init__()
        self.kind = kind
        self.layer: nn.Module = nn.Identity()
        if kind == "pairs":  # of three channels, one is in both
            self.layer = enn.Householder(2)
            self.layer.channels = 3
            nn.init.zeros_(self.layer.theta)
        elif kind == "part":
            self.layer = enn.ScaledAvgPool2d(2)
            self.layer.kernel_size = Loose(2)

    def forward(self, x: Tensor) -> Tensor:
        """Return what it makes of x."""
        if self.kind == "factor":
            return x * Steep(30.0)
        if self.kind == "slope":
            return nn.functional.leaky_relu(x - 0.5, Steep(30.0))
        if self.kind == "divisor":
            return nn.functional.avg_pool2d(x, 2, divisor_override=Loose(1))
        if self.kind == "sum":
            return torch.add(x, x.relu(), alpha=Steep(30.0))
        if self.kind == "pairs":
            return torch.as_tensor(self.layer(x[:, :1].repeat(1, 3, *[1] * (x.ndim - 2))))
        return torch.as_tensor(self.layer(x))

    def extra_repr(self) -> str:
        """Show which one."""
        return self.kind
