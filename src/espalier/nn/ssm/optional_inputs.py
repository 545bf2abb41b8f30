"""Checks that both recurrences share: of the inputs that they may do without, and of where all of them are."""

from __future__ import annotations

from torch import Tensor

from espalier.errors import EspalierError


def check_rest(
    skip: Tensor | None,
    initial_state: Tensor | None,
    mask: Tensor | None,
    sizes: tuple[int, int, int],
    state_shape: tuple[int, ...],
) -> None:
    """Refuse skip weights, an initial state or a mask of the wrong shape.

    Args:
        skip: the skip weights D, one a channel or head.
        initial_state: the state before the first token.
        mask: true at real tokens, (batch, length).
        sizes: (batch, length, channels or heads).
        state_shape: the shape of the state.

    Raises:
        EspalierError: one of them has another shape.
    """
    wanted = {
        "d": (skip, sizes[2:]),
        "initial_state": (initial_state, state_shape),
        "mask": (mask, sizes[:2]),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != tuple(shape):
            raise EspalierError(f"{name} is {tuple(tensor.shape)}: give it the shape {tuple(shape)}")


def check_devices(x: Tensor, *others: Tensor | None) -> None:
    """Raise ``EspalierError`` unless all inputs are where x is: a kernel would read memory that is not there."""
    if any(other is not None and other.device != x.device for other in others):
        raise EspalierError(f"x is on {x.device} and something else on another device: put all inputs on one")
