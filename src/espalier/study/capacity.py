"""State capacity: how long the strings are that a trained model still copies, by state size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from espalier.data import GeneratedSource
from espalier.errors import EspalierError
from espalier.randomness import derive_generator
from espalier.study.statistics import Interval, PairedDifference, paired_difference, t_interval
from espalier.study.summary import LEVEL, Summary, summarise
from espalier.study.table import mean_and_interval
from espalier.train import Run
from espalier.train.evaluate import evaluate
from espalier.train.losses import build_loss

THRESHOLD = 0.9
LADDER = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)
"""Lengths that are measured, in training lengths."""


@dataclass(frozen=True)
class Capacity:
    """One arm at one state size, at its best learning rate: the longest length by seed."""

    state_size: int
    arm: str
    lr: float | None
    lengths: Mapping[int, int]


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


def measure_capacity(summary: Summary, *, threshold: float = THRESHOLD, examples: int = 128) -> list[Capacity]:
    """Measure every arm of one study at its own best learning rate.

    The rate is chosen by the study's headline score and not by what is measured here. Diverged runs have no length.
    """
    recipe = summary.study.recipe
    length = int(recipe.data_args["length"])
    ladder = sorted({max(1, round(factor * length)) for factor in LADDER})
    found = []
    for arm in summary.arms:
        lengths = {}
        for seed in summary.study.seeds if arm.best_lr is not None else ():
            run = summary.run(arm.arm, arm.best_lr, seed) if arm.best_lr is not None else None
            if run is not None and run.result is not None and not run.result["diverged"]:
                lengths[seed] = longest_length(accuracy_by_length(run, ladder, examples), threshold)
        found.append(Capacity(int(recipe.model_args["state_size"]), arm.arm, arm.best_lr, lengths))
    return found


def capacity_table(found: Sequence[Capacity], *, threshold: float = THRESHOLD, level: float = LEVEL) -> str:
    """Return the measured lengths as a Markdown table, with differences to the first arm paired by seed.

    Args:
        found: all arms of all state sizes; the first arm is the baseline.
        threshold: the accuracy that was asked for, for the heading.
        level: confidence level of the intervals.
    """
    baseline = {row.state_size: row for row in found if row.arm == found[0].arm} if found else {}
    head = ("state size", "arm", "best lr", f"longest length with ≥ {100 * threshold:g} %", "difference", "runs")
    rows = [head, ("---",) * len(head)]
    for row in sorted(found, key=lambda row: row.state_size):
        difference = None
        base = baseline.get(row.state_size)
        if base is not None and base is not row:
            generator = derive_generator(0, "bootstrap", row.arm, row.state_size)
            difference = paired_difference(row.lengths, base.lengths, level, generator=generator)
        length = t_interval([float(n) for n in row.lengths.values()], level) if row.lengths else None
        rate = "–" if row.lr is None else f"{row.lr:g}"
        cells = (str(row.state_size), row.arm, rate, mean_and_interval(length, percent=False))
        rows.append((*cells, "baseline" if base is row else _difference(difference), str(len(row.lengths))))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def capacity_of_studies(folders: Sequence[Path | str], *, threshold: float = THRESHOLD) -> str:
    """Return the table over study folders that differ in their state size."""
    found = [row for folder in folders for row in measure_capacity(summarise(folder), threshold=threshold)]
    return capacity_table(found, threshold=threshold)


def _difference(difference: PairedDifference | None) -> str:
    if difference is None:
        return "–"
    interval: Interval = difference.t
    if not interval.defined:
        return f"{interval.mean:+.3g} (n = 1)"
    text = f"{interval.mean:+.3g} [{interval.low:+.3g}, {interval.high:+.3g}]"
    return text if difference.shown else f"no difference shown, {text}"
