"""What torch's datasets say of their classes, however they are wrapped or joined: how many, and by which numbers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from espalier.errors import EspalierError

_MOST_WRAPPERS = 100_000
"""Where the walk ends: an object that makes another wrapper at every look has no last one."""


def refuse_two_numbers(name: str, splits: Mapping[str, Any]) -> None:
    """Compare the numbers that the data sets of all splits give their classes.

    Args:
        name: of the data, for messages.
        splits: datasets or loaders by name.

    Raises:
        EspalierError: one class has two numbers, in two splits or within one.
    """
    known: dict[str, tuple[int, str]] = {}
    for split, data in splits.items():
        for leaf, mapped in _leaves(data):
            # What a target_transform makes of the numbers is not known.
            for label, number in ({} if mapped else _class_numbers(leaf)).items():
                wanted, first = known.setdefault(label, (number, split))
                if number != wanted:
                    raise EspalierError(
                        f"{name}: class {label!r} has number {wanted} in {first} and {number} in {split}: give all the "
                        "same classes, one of them a target_transform, or a wrapper that renumbers them its own classes"
                    )


def count_classes(data: Any) -> int | None:
    """Return how many classes a split has, if every data set that it is made of says so, or it itself.

    Of several data sets it is not known where one's targets are mapped, or one number stands for two names: a wrapper
    may count the classes of one on from those of the other.
    """
    leaves = _leaves(data)
    counts = [_own_count(leaf) for leaf, _ in leaves]
    known = [count for count in counts if count is not None]
    named = {pair for leaf, _ in leaves for pair in _class_numbers(leaf).items()}
    doubtful = any(mapped for _, mapped in leaves) or len(named) > len({number for _, number in named})
    if known and len(known) == len(counts) and not (doubtful and len(leaves) > 1):
        return max(known)
    return _own_count(getattr(data, "dataset", data))


def _leaves(data: Any) -> list[tuple[Any, bool]]:
    """Return the data sets that a split is made of, and whether a target_transform on the way changes their targets.

    A wrapper has what it wraps as ``dataset``, or several as ``datasets``, by the names that torch uses. One that
    states classes of its own speaks for what it wraps.
    """
    leaves = []
    waiting = [(data, False)]
    seen: set[tuple[int, bool]] = set()
    for item, mapped in waiting:  # the list grows, and keeps alive what a property made: no identity comes twice
        if (id(item), mapped) in seen or len(seen) > _MOST_WRAPPERS:
            continue
        seen.add((id(item), mapped))
        mapped = mapped or getattr(item, "target_transform", None) is not None
        parts = [] if _states_classes(item) else _wrapped(item)
        waiting += [(part, mapped) for part in parts]
        if not parts:
            leaves.append((item, mapped))
    return leaves


def _wrapped(data: Any) -> list[Any]:
    parts = getattr(data, "datasets", ())
    if isinstance(parts, Mapping):
        parts = parts.values()
    # torch's ChainDataset takes iterators too, which nobody may read before the training does.
    several = list(parts) if isinstance(parts, Collection) and not isinstance(parts, str) else []
    return [data.dataset, *several] if hasattr(data, "dataset") else several


def _states_classes(data: Any) -> bool:
    return any(getattr(data, name, None) is not None for name in ("classes", "class_to_idx"))


def _class_numbers(data: Any) -> dict[str, int]:
    """Return the numbers that a dataset as torchvision has them gives its classes, by name; none, if it names none.

    ``ImageFolder`` counts the folders that it finds: a split that lacks one counts the others otherwise.
    """
    numbers, classes = getattr(data, "class_to_idx", None), getattr(data, "classes", None)
    if isinstance(numbers, Mapping):
        known = all(isinstance(label, str) and isinstance(number, int) for label, number in numbers.items())
        return dict(numbers) if known else {}
    if not (isinstance(classes, list | tuple) and all(isinstance(label, str) for label in classes)):
        return {}
    return {label: number for number, label in enumerate(classes)}


def _own_count(data: Any) -> int | None:
    """Return how many classes a dataset says that it has, by the names that torchvision and torch use."""
    if numbers := _class_numbers(data):
        return max(numbers.values()) + 1
    if (classes := getattr(data, "classes", None)) is not None:
        return len(classes)
    targets = data.tensors[-1] if hasattr(data, "tensors") else getattr(data, "targets", None)
    if targets is None:
        return None
    targets = torch.as_tensor(targets)
    return None if targets.is_floating_point() or targets.dim() != 1 else int(targets.max()) + 1
