"""State capacity: how long the strings are that a trained model still copies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from espalier.data import GeneratedSource
from espalier.errors import EspalierError
from espalier.train import Run
from espalier.train.evaluate import evaluate
from espalier.train.losses import build_loss

THRESHOLD = 0.9
LADDER = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)
"""Lengths that are measured, in training lengths."""


def accuracy_by_length(run: Run, lengths: Sequence[int], examples: int = 128) -> dict[int, float]:
    """Return the token accuracy of a run's final model on fixed examples of exactly each length.

    Raises:
        EspalierError: the run has no final weights, or its data has no length.
    """
    source = run.source()
    if not isinstance(source, GeneratedSource):
        raise EspalierError(f"run {run.path}: dataset {run.recipe.dataset!r} has no lengths: take a recall task")
    ladder = source.at_lengths(lengths, examples)
    scores = evaluate(run.model(), ladder, build_loss(run.recipe, smoothing=False), examples)
    return {length: scores[f"length_{length}/accuracy"] for length in lengths}


def longest_length(accuracies: Mapping[int, float], threshold: float = THRESHOLD) -> int:
    """Return the largest length up to which every measured one reaches ``threshold``; 0 if the shortest fails."""
    longest = 0
    for length in sorted(accuracies):
        if accuracies[length] < threshold:
            break
        longest = length
    return longest


def longest_copied(run: Run) -> Mapping[str, float]:
    """Return the longest length of the ladder that a run still copies, for its record."""
    length = int(run.recipe.data_args["length"])
    ladder = sorted({max(1, round(factor * length)) for factor in LADDER})
    return {"longest": longest_length(accuracy_by_length(run, ladder))}
