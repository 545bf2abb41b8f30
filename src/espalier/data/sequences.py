"""Generated token tasks as sources: every batch a pure function of (seed, epoch, step), tests from a fixed stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from espalier.data.arguments import read_arguments
from espalier.data.recall import MARKS, copying, mqar, ngram_lookup, usual_pairs
from espalier.data.source import require_step
from espalier.errors import require_known
from espalier.randomness import derive_generator
from espalier.sizes import whole_number

if TYPE_CHECKING:
    from espalier.recipes.base import Recipe

Draw = Callable[..., tuple[Tensor, Tensor]]
"""``draw(count, length, generator=…)`` returns inputs and targets (B, L)."""

FACTORS = {"test": 1, "test_2x": 2, "test_4x": 4}
"""Lengths of the evaluation splits, in training lengths."""


class TokenBatches:
    """What the sources of tokens have in common: a vocabulary, and evaluation examples in memory."""

    model_args: Mapping[str, Any]
    _splits: dict[str, tuple[Tensor, Tensor]]

    @property
    def eval_splits(self) -> tuple[str, ...]:
        """Names of the evaluation splits; the first carries the headline score."""
        return tuple(self._splits)

    def to(self, device: torch.device | str) -> Self:
        """Move the evaluation examples to ``device`` and return the source."""
        self._splits = {name: (tokens.to(device), wanted.to(device)) for name, (tokens, wanted) in self._splits.items()}
        return self

    def eval_batches(self, split: str, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the examples of ``split`` in their fixed order.

        Raises:
            EspalierError: unknown split.
        """
        require_known("split", split, self._splits)
        inputs_BL, targets_BL = self._splits[split]
        yield from zip(inputs_BL.split(batch_size), targets_BL.split(batch_size), strict=True)


class GeneratedSource(TokenBatches):
    """A ``Source`` of examples that are drawn as they are needed, on the source's device.

    The evaluation splits hold examples of exactly 1, 2 and 4 times the training length, from a stream of their own
    that does not depend on a run's seed.

    Args:
        name: what the evaluation stream is named after.
        vocab_size: tokens of the task.
        length: training length.
        train: draws training examples; they may be shorter than ``length``.
        exact: draws examples of exactly the length that it is given.
        steps_per_epoch: batches called an epoch.
        eval_examples: examples of each evaluation split.
    """

    def __init__(
        self,
        name: str,
        vocab_size: int,
        length: int,
        train: Draw,
        exact: Draw,
        *,
        steps_per_epoch: int = 100,
        eval_examples: int = 256,
    ) -> None:
        self._name, self.length = name, length
        self.model_args = {"vocab_size": vocab_size}
        self._train, self._exact = train, exact
        self._steps = whole_number("steps_per_epoch", steps_per_epoch)
        count = whole_number("eval_examples", eval_examples)
        self._device = torch.device("cpu")
        self._splits = {split: self.examples(factor * length, count) for split, factor in FACTORS.items()}

    def to(self, device: torch.device | str) -> Self:
        """Draw on ``device`` from now on, move the evaluation examples there and return the source."""
        self._device = torch.device(device)
        return super().to(device)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Return the number of batches called an epoch, whatever their size."""
        return self._steps

    def train_batch(self, seed: int, epoch: int, step: int, batch_size: int) -> tuple[Tensor, Tensor]:
        """Return batch ``step`` of ``epoch``: inputs and targets (B, L).

        Raises:
            IndexError: the epoch has no such step.
        """
        require_step(step, self._steps, batch_size)
        generator = derive_generator(seed, "train", epoch, step, device=self._device)
        return self._train(batch_size, self.length, generator=generator)

    def at_lengths(self, lengths: Sequence[int], count: int) -> Self:
        """Return a copy whose evaluation splits are ``length_N`` for every N of ``lengths``, of ``count`` examples.

        Raises:
            EspalierError: a length that the task cannot have.
        """
        other = copy(self)
        other._splits = {f"length_{length}": self.examples(length, count) for length in lengths}
        return other

    def examples(self, length: int, count: int) -> tuple[Tensor, Tensor]:
        """Return ``count`` evaluation examples of exactly ``length``, the same ones at every call.

        Raises:
            EspalierError: a length that the task cannot have.
        """
        # Drawn on the CPU, so that every device is tested on the same examples.
        generator = derive_generator(0, "evaluation", self._name, length)
        inputs_BL, targets_BL = self._exact(count, length, generator=generator)
        return inputs_BL.to(self._device), targets_BL.to(self._device)


_COUNTS: dict[str, Any] = {"steps_per_epoch": 100, "eval_examples": 256}
_STRINGS: dict[str, Any] = {"vocab_size": MARKS + 26, "length": 50}


def copying_source(recipe: Recipe) -> GeneratedSource:
    """Return copying (arguments: ``vocab_size``, ``length``, ``min_length``, ``order``, and the counts).

    Training lengths are uniform on {min_length, …, length}.
    """
    return _source(recipe, copying, _STRINGS | {"min_length": 1, "order": "forward"})


def sorting_source(recipe: Recipe) -> GeneratedSource:
    """Return sorting (arguments: ``vocab_size``, ``length``, ``min_length``, and the counts)."""
    return _source(recipe, partial(copying, order="sorted"), _STRINGS | {"min_length": 1})


def ngram_lookup_source(recipe: Recipe) -> GeneratedSource:
    """Return n-gram look-up (``vocab_size``, ``length``, ``ngram``, ``answer_length``, ``side``, and the counts)."""
    return _source(recipe, ngram_lookup, _STRINGS | {"ngram": 2, "answer_length": 1, "side": "suffix"})


def mqar_source(recipe: Recipe) -> GeneratedSource:
    """Return multi-query associative recall; longer splits hold as many pairs as training has, further apart.

    Arguments: ``vocab_size``, ``length``, ``pairs``, ``placement``, ``power``, ``random_filler``, and the counts
    ``steps_per_epoch`` and ``eval_examples``.
    """
    task = {"vocab_size": 8192, "length": 64, "pairs": None, "placement": "power", "power": 0.01, "random_filler": True}
    return _source(recipe, mqar, task)


def _source(recipe: Recipe, task: Draw, defaults: Mapping[str, Any]) -> GeneratedSource:
    found = read_arguments(recipe, {**defaults, **_COUNTS}, reads_files=False)
    counts, length = {name: found.pop(name) for name in _COUNTS}, whole_number("length", found.pop("length"))
    if "pairs" in found and found["pairs"] is None:
        found["pairs"] = usual_pairs(length)
    train = partial(task, **found)
    exact = partial(train, min_length=None) if "min_length" in found else train
    return GeneratedSource(recipe.dataset, found["vocab_size"], length, train, exact, **counts)
