"""Sizes as users give them: whole numbers, one by one or along every axis."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

from espalier.errors import EspalierError


def whole_number(name: str, value: Any, least: int = 1) -> int:
    """Return a size as an ``int``; what Python can count with, such as numpy's whole numbers, is one.

    Args:
        name: of the argument, for the message.
        value: as given.
        least: the smallest size that makes sense.

    Raises:
        EspalierError: no whole number (``2.0`` and ``True`` are none), or one below the least.
    """
    size = _counted(value)
    if size is None or size < least:
        raise EspalierError(f"{name} is {value!r:.100}: give a whole number from {least}")
    return size


def whole_numbers(least: int = 1, /, **sizes: Any) -> list[int]:
    """Return the arguments, by their names, as ``whole_number`` does each of them."""
    return [whole_number(name, value, least) for name, value in sizes.items()]


def per_axis(name: str, value: Any, axes: int, least: int = 1) -> tuple[int, ...]:
    """Return the size along every axis: the one given for all of them, or those given one by one.

    Raises:
        EspalierError: neither; see ``whole_number``.
    """
    one = _counted(value)
    sizes = [one] * axes if one is not None else [_counted(v) for v in value] if isinstance(value, Iterable) else []
    counted = tuple(size for size in sizes if size is not None and size >= least)
    if not len(counted) == len(sizes) == axes:
        several = f", or one for each of {axes} axes" if axes > 1 else ""
        raise EspalierError(f"{name} is {value!r:.100}: give a whole number from {least}{several}")
    return counted


def _counted(value: Any) -> int | None:
    """Return a whole number as an ``int``, None for anything else: to Python, True is the number 1."""
    if type(value) is int:  # nearly all are, and a compiler that meets the call sees no further
        return value
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None
