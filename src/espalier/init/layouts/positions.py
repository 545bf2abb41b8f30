"""Arguments that are one sequence but for what is added to it: ``attn(x + p, x + p, x)`` attends to its own tokens.

Positions stay where the input moves: an argument that moves as the first one does holds the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from espalier.init.layouts.arguments import may_be_moved
from espalier.init.layouts.compare import is_clear, is_near
from espalier.init.layouts.scratch import Call, CannotRunError

# How far an input is moved, in its own deviations.
_STEP = 0.3


def one_sequence_each(seen: list[Call], again: Callable[[], object]) -> list[Call]:
    """Return calls of a part with its own tokens wherever an argument holds them, positions aside.

    Args:
        seen: the calls of a run of whoever calls it; emptied, and filled anew by ``again``.
        again: repeats that run on other tokens.
    """
    before = [*seen]
    found = tokens_alike(before, seen, again)
    return [without_positions(call, keys) for call, keys in zip(before, found, strict=True)] if found else before


def tokens_alike(before: Sequence[Call], seen: list[Call], again: Callable[[], object]) -> list[set[int | str]]:
    """Return by call which arguments hold the first one's tokens, positions aside; nothing if none does."""
    if not any(map(differing, before)):
        return []
    seen.clear()
    with suppress(CannotRunError):  # what fails after the part does not matter
        again()
    found = [same_tokens(call, other) for call, other in zip(before, seen, strict=False)]
    return found if len(before) == len(seen) and any(found) else []


def differing(call: Call) -> list[tuple[int | str, Tensor, Tensor]]:
    """Return the arguments that have the shape of the first and other numbers: place or name, it, the first."""
    given: list[tuple[int | str, Any]] = [*enumerate(call.args), *call.kwargs.items()]
    numbers = [(key, value) for key, value in given if isinstance(value, Tensor) and value.is_floating_point()]
    if not numbers or numbers[0][0] != given[0][0]:
        return []
    first = numbers[0][1]
    return [(k, v, first) for k, v in numbers[1:] if v.shape == first.shape and not torch.equal(v, first)]


def moved(call: Call) -> Call:
    """Return a call on other tokens: numbers a step away, token ids in another order; positions and masks as before."""
    generator = torch.Generator().manual_seed(7)

    def shift(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.ndim:
            return value
        if not value.is_floating_point():
            return value.flip(-1)
        return value + _STEP * torch.randn(value.shape, generator=generator, dtype=value.dtype)

    args = tuple(shift(value) if place == 0 else value for place, value in enumerate(call.args))
    tokens = [name for place, name in enumerate(call.kwargs) if may_be_moved(name) or (place == 0 and not args)]
    return replace(
        call, args=args, kwargs={k: shift(value) if k in tokens else value for k, value in call.kwargs.items()}
    )


def same_tokens(call: Call, other: Call) -> set[int | str]:
    """Return which arguments hold the first one's tokens, positions aside, by the same part's call on other tokens."""
    then = {key: (value, first) for key, value, first in differing(other)}
    return {
        key
        for key, value, first in differing(call)
        if key in then and is_clear(step := then[key][1] - first) and is_near(then[key][0] - value, step)
    }


def without_positions(call: Call, keys: set[int | str]) -> Call:
    """Return a call in which these arguments are the first."""
    if not keys:
        return call
    first = next(iter((*call.args, *call.kwargs.values())))
    args = tuple(first if place in keys else value for place, value in enumerate(call.args))
    return replace(call, args=args, kwargs={k: first if k in keys else value for k, value in call.kwargs.items()})
