"""Checks of inputs that the layers of this folder share."""

from __future__ import annotations

from torch import Tensor

from espalier.errors import EspalierError


def check_width(x: Tensor, axis: int, width: int, wanted: str, most: int | None = None) -> None:
    """Refuse an input of another width; what torch.fx traces with is no tensor, and has no branches.

    Args:
        x: the input.
        axis: along which its width is counted.
        width: what it must be.
        wanted: the shape that is wanted, for the message.
        most: dimensions that the input may have; any number if None.

    Raises:
        EspalierError: too few or too many dimensions, or another width.
    """
    if not isinstance(x, Tensor):
        return
    least = axis + 1 if axis >= 0 else -axis
    if x.ndim < least or (most is not None and x.ndim > most) or x.shape[axis] != width:
        raise EspalierError(f"input is {tuple(x.shape)}: give {wanted}")


def check_floating(x: Tensor) -> None:
    """Refuse integers, whose sums and roots would be cut or are not defined, and complex numbers.

    Raises:
        EspalierError: the input holds no real floating-point numbers.
    """
    if isinstance(x, Tensor) and not x.dtype.is_floating_point:
        raise EspalierError(f"input is {x.dtype}: convert it to floating point (images: x.float() / 255)")
