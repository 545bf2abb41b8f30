"""Checks that the state-space operations share: the shapes of single inputs, and where all of them are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from espalier.errors import EspalierError


def check_shapes(**wanted: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Raise ``EspalierError`` unless every input, by its name, is a tensor of the shape beside it; None passes."""
    for name, (tensor, shape) in wanted.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise EspalierError(f"{name} is a {type(tensor).__name__}: give a tensor of the shape {tuple(shape)}")
        if tuple(tensor.shape) != tuple(shape):
            raise EspalierError(f"{name} is {tuple(tensor.shape)}: give it the shape {tuple(shape)}")


def check_devices(x: Tensor, *others: Tensor | None) -> None:
    """Raise ``EspalierError`` unless all inputs are where x is: a kernel would read memory that is not there."""
    if any(other is not None and other.device != x.device for other in others):
        raise EspalierError(f"x is on {x.device} and something else on another device: put all inputs on one")


def at_real_tokens(mask_BL: Tensor, *tensors: Tensor | None) -> list[Any]:
    """Return tensors (B, L, …) with zeros in the padding, whatever stood there: 0 times it may be no 0."""
    real_BL = mask_BL.bool()
    return [None if t is None else torch.where(real_BL[(..., *[None] * (t.ndim - 2))], t, 0.0) for t in tensors]
