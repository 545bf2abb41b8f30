"""The learning rates and seeds of a study, from what a user writes for them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from espalier.errors import EspalierError

Rates = Sequence[float] | Literal["auto"]

# Steps of √10 around the recipe's own rate: a factor of 100 in all, fine enough to see where a window ends.
_AUTO_STEPS = (-2, -1, 0, 1, 2)
_NO_SEED = 10**18


def learning_rates(centre: float, lrs: Rates) -> set[float]:
    """Return the rates to try; ``"auto"`` is five, √10 apart and centred on the recipe's own, to two digits.

    Rates are kept to the six digits that folder names show.

    Raises:
        EspalierError: no rate, or one that is not a positive number.
    """
    if isinstance(lrs, str) and lrs == "auto":
        rates = [float(f"{centre * 10 ** (step / 2):.2g}") for step in _AUTO_STEPS if step] + [centre]
    else:
        rates = listed("lrs", lrs, "learning rates such as [1e-3, 3e-3], or 'auto'")
    for lr in rates:
        if not (isinstance(lr, int | float) and not isinstance(lr, bool) and 0 < lr <= sys.float_info.max):
            raise EspalierError(f"lrs: {lr!r} is no learning rate: give positive numbers, or 'auto'")
    return {float(f"{lr:g}") for lr in rates}


def seed_numbers(seeds: int | Sequence[int]) -> set[int]:
    """Return the seeds to try; a number is how many, from 0.

    Raises:
        EspalierError: none, or one that is no whole number from 0.
    """
    count = seeds.tolist() if hasattr(seeds, "tolist") else seeds  # NumPy's or torch's
    numbers = range(count) if type(count) is int else count
    numbers = listed("seeds", numbers or seeds, "how many, from 1, or which, such as [0, 1, 2]")
    for seed in numbers:
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < _NO_SEED:
            raise EspalierError(f"seeds: {seed!r} is no seed: give whole numbers from 0, of at most 18 digits")
    return set(numbers)


def listed(name: str, values: Any, wanted: str) -> list[Any]:
    """Return several values as a list: those of an array or a tensor, too, and of what can be read only once.

    Args:
        name: of the argument, for the message.
        values: what the user gave.
        wanted: what to give instead, for the message.

    Raises:
        EspalierError: one value in place of several, or none.
    """
    several = isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping)
    if not (found := list(values) if several else []):
        raise EspalierError(f"{name} {'is empty' if several else repr(values)}: give {wanted}")
    return [value.tolist() if hasattr(value, "tolist") else value for value in found]
