"""What a family of layers must be able to do: write its structure, measure it, verify it, fit it."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from espalier.contents import bytes_in, without_numbers
from espalier.init.layouts.find import Place

# No weight or product of a layer that works is anywhere near this.
LARGEST = 1e6


class LayerFit(Protocol):
    """What one layer is near to: a frozen dataclass that prints as a line."""

    @property
    def layer(self) -> str:
        """The layer's name."""
        ...


class Family(ABC):
    """One kind of layer.

    Attributes:
        kind: the keyword of ``structure_``, the word in reports and the ``kind`` of the views that its layouts return.
        default: the spec that ``structure_`` writes when none is given.
        row: the class of its fits.
        unspecific: parts of which ordinary starts show as much: they count where an earlier report had them.
    """

    kind: ClassVar[str]
    default: ClassVar[Any]
    row: ClassVar[type]
    unspecific: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def write(self, weights: Any, spec: Any, place: Place, generator: torch.Generator) -> str:
        """Write what the spec asks of the layer at this place, in place, and return in words what that was."""

    @abstractmethod
    def measure(self, weights: Any) -> dict[str, float]:
        """Return figures of what the weights show."""

    @abstractmethod
    def verify(self, weights: Any, spec: Any, place: Place, measured: Mapping[str, float]) -> str:
        """Return what the figures contradict in what was asked, in words, or the empty string."""

    @abstractmethod
    def scores(self, measured: Mapping[str, float]) -> dict[str, float]:
        """Return how far each part of the structure stands out, with its sign: from ±1 on it counts as there."""

    @abstractmethod
    def fit(self, name: str, weights: Any) -> LayerFit:
        """Return what the layer is near to."""

    def placed(self, fitted: Any, place: Place) -> Any:
        """Return a layer's fit with its place, where the spec depends on that."""
        return fitted

    @abstractmethod
    def spec(self, rows: Sequence[Any]) -> Any:
        """Return the spec that writes what the fits of a model's layers show, or ``None`` where they show nothing."""

    def lines(self, rows: Sequence[Any]) -> list[str]:
        """Return the fits of a model's layers in words."""
        return [str(row) for row in rows]

    def selects(self, spec: Any, place: Place) -> bool:
        """Return whether the layer at this place is one of those that the spec asks for."""
        return True

    def set_by_hand(self, weights: Any) -> str:
        """Return why weights are no start that could be replaced by another, or the empty string."""
        return ""

    def note(self, weights: Any, module: nn.Module) -> str:
        """Return what a reader of the layer's row should know."""
        return weights.note

    def remark(self, weights: Any, spec: Any, module: nn.Module, model: nn.Module) -> str:
        """Return what a reader of the report should know of a spec in such a model, or the empty string."""
        return ""

    def sums(self, weights: Any) -> dict[str, float]:
        """Return the sum of every view: enough to see NaN, and that another layer has written to the same storage."""
        return {
            name: float(part.sum(dtype=torch.promote_types(part.dtype, torch.float32)))
            for name, part in tensors(weights)
        }

    def damage(self, weights: Any, sums: Mapping[str, float]) -> str:
        """Return why these weights cannot work, or the empty string."""
        bad = [name for name, value in sums.items() if not math.isfinite(value)]
        if not bad:
            return ""
        return f"{', '.join(bad)} {'hold' if len(bad) > 1 else 'holds'} NaN, infinite or overflowing values"

    def excess(self, measured: Mapping[str, float]) -> str:
        """Return which figures are too large for weights that work, or the empty string; standard scores may be."""
        sizes = {name: abs(value) for name, value in measured.items() if not name.endswith("_z")}
        large = [f"{name} {value:.3g}" for name, value in sizes.items() if value > LARGEST]
        if large or any(math.isnan(score) for score in self.scores(measured).values()):
            return f"its values are too large to be measured or trained ({', '.join(large) or 'the products overflow'})"
        return ""

    def bits(self, weights: Any) -> str:
        """Return a digest of every view's exact values and type."""
        digest = hashlib.blake2b(digest_size=16)
        for _, part in tensors(weights):
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            for piece in bytes_in(part):
                digest.update(piece)
        return digest.hexdigest()


def tensors(weights: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield every view of a layer with its name; several under one name are numbered."""
    for name, value in vars(weights).items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, tuple):
            yield from ((f"{name}[{index}]", part) for index, part in enumerate(value) if isinstance(part, Tensor))


def nowhere(weights: Any) -> str:
    """Return why some of the weights have no numbers yet, or the empty string."""
    return next(filter(None, (without_numbers(part) for _, part in tensors(weights))), "")
