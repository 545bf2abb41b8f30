"""Checks that the state-space operations share: the shapes of single inputs, and where all of them are."""

from __future__ import annotations

from torch import Tensor

from espalier.errors import EspalierError


def check_shapes(**wanted: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Raise ``EspalierError`` unless every tensor, by its name, has the shape beside it; None passes."""
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != tuple(shape):
            raise EspalierError(f"{name} is {tuple(tensor.shape)}: give it the shape {tuple(shape)}")


def check_devices(x: Tensor, *others: Tensor | None) -> None:
    """Raise ``EspalierError`` unless all inputs are where x is: a kernel would read memory that is not there."""
    if any(other is not None and other.device != x.device for other in others):
        raise EspalierError(f"x is on {x.device} and something else on another device: put all inputs on one")
