"""What a study found, arm by arm, with the number of runs behind every number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from espalier.randomness import derive_generator
from espalier.study.statistics import (
    Interval,
    PairedDifference,
    Window,
    best_rate,
    first_crossing,
    paired_difference,
    rate_window,
    t_interval,
)
from espalier.study.trial import Study, Trial, load_study
from espalier.train import Run, load_run

LEVEL = 0.95
TOLERANCE = 0.02


@dataclass(frozen=True)
class RatePoint:
    """One arm at one learning rate: the score of every seed that has one, and the seeds whose run diverged."""

    lr: float
    scores: Mapping[int, float]
    diverged: tuple[int, ...] = ()

    @property
    def counts(self) -> bool:
        """Whether the rate can be the best or in the window: it has scores, and no seed diverged."""
        return bool(self.scores) and not self.diverged

    @property
    def mean(self) -> float:
        """Mean score over the seeds that have one, NaN where none has."""
        return fmean(self.scores.values()) if self.scores else math.nan


@dataclass(frozen=True)
class CurvePoint:
    """One evaluation of an arm at its best rate: the scores of all seeds at the same step."""

    epoch: float
    step: int
    seconds: float
    score: Interval


@dataclass(frozen=True)
class ArmSummary:
    """What the study says of one arm; None and NaN stand where there are too few runs to say it."""

    arm: str
    changes: Mapping[str, Any]
    rates: tuple[RatePoint, ...]
    best_lr: float | None
    window: Window | None
    score: Interval | None
    """Mean score at the best rate."""
    difference: PairedDifference | None
    """To the baseline, each arm at its own best rate; None for the baseline itself."""
    curve: tuple[CurvePoint, ...]
    epochs_to_baseline: float
    """When the mean curve first reaches the baseline's final mean score; NaN if it never does."""
    steps_to_baseline: float
    epochs: int
    step_seconds: float
    """Median over the finished runs of each run's median step."""
    step_ratio: float
    """``step_seconds`` over the baseline's."""
    planned: int
    finished: int
    diverged: int
    failed: int


@dataclass(frozen=True)
class Summary:
    """What a study found; the first arm is the baseline that the others are compared with."""

    study: Study
    metric: str
    level: float
    tolerance: float
    arms: tuple[ArmSummary, ...]
    failures: tuple[tuple[Trial, str], ...]
    runs: Mapping[Path, Run] = field(repr=False)
    """The finished runs by folder."""

    def run(self, arm: str, lr: float, seed: int) -> Run | None:
        """Return one finished run, None where there is none."""
        return self.runs.get(self.study.trial(arm, lr, seed).path)


def summarise(folder: Path | str, *, level: float = LEVEL, tolerance: float = TOLERANCE) -> Summary:
    """Summarise the finished runs of a study; what is missing, diverged or failed is counted, never hidden.

    A diverged run has no score. A rate at which any seed diverged can neither be the best nor lie in the window:
    leaving such seeds out of a mean would favour the arm that diverges.

    Args:
        folder: the study folder.
        level: confidence level of every interval.
        tolerance: how far below the best mean score a rate may lie to count for the window, in units of the score.

    Raises:
        EspalierError: not a study folder, or a damaged run in it.
    """
    study = load_study(folder)
    trials = study.trials()
    runs = {trial.path: load_run(trial.path) for trial in trials if trial.finished}
    metric = next((str(run.result["metric"]) for run in runs.values() if run.result), "score")
    arms: list[ArmSummary] = []
    for arm in study.arms:
        mine = [trial for trial in trials if trial.arm == arm]
        arms.append(_summarise_arm(study, mine, runs, metric, arms[0] if arms else None, level, tolerance))
    failures = tuple((trial, text) for trial in trials if (text := trial.failure) is not None)
    return Summary(study, metric, level, tolerance, tuple(arms), failures, runs)


def _summarise_arm(
    study: Study,
    trials: Sequence[Trial],
    runs: Mapping[Path, Run],
    metric: str,
    baseline: ArmSummary | None,
    level: float,
    tolerance: float,
) -> ArmSummary:
    arm = trials[0].arm
    rates = tuple(_rate_point(lr, [trial for trial in trials if trial.lr == lr], runs) for lr in study.lrs)
    means = {point.lr: point.mean for point in rates if point.counts}
    best = best_rate(means)
    scores = _scores_at(rates, best)
    curve = _curve([runs[t.path] for t in trials if t.lr == best and t.path in runs], metric, level)
    times = [t for trial in trials if (t := _result(runs, trial).get("step_seconds")) is not None]
    step_seconds = median(times) if times else math.nan
    score = t_interval(list(scores.values()), level) if scores else None
    target = baseline.score if baseline else score
    goal = target.mean if target else math.nan
    values = [point.score.mean for point in curve]
    difference = None
    if baseline is not None:
        generator = derive_generator(0, "bootstrap", arm)
        difference = paired_difference(scores, _scores_at(baseline.rates, baseline.best_lr), level, generator=generator)
    return ArmSummary(
        arm=arm,
        changes=study.arms[arm],
        rates=rates,
        best_lr=best,
        window=rate_window(means, study.lrs, tolerance),
        score=score,
        difference=difference,
        curve=curve,
        epochs_to_baseline=first_crossing([point.epoch for point in curve], values, goal),
        steps_to_baseline=first_crossing([point.step for point in curve], values, goal),
        epochs=study.recipe.epochs,
        step_seconds=step_seconds,
        step_ratio=step_seconds / (baseline.step_seconds if baseline else step_seconds),
        planned=len(trials),
        finished=sum(trial.path in runs for trial in trials),
        diverged=sum(len(point.diverged) for point in rates),
        failed=sum(trial.failure is not None for trial in trials),
    )


def _result(runs: Mapping[Path, Run], trial: Trial) -> Mapping[str, Any]:
    run = runs.get(trial.path)
    return run.result if run is not None and run.result is not None else {}


def _rate_point(lr: float, trials: Sequence[Trial], runs: Mapping[Path, Run]) -> RatePoint:
    results = {trial.seed: _result(runs, trial) for trial in trials}
    diverged = tuple(seed for seed, result in results.items() if result.get("diverged"))
    scores = {
        seed: float(result["score"])
        for seed, result in results.items()
        if seed not in diverged and result.get("score") is not None
    }
    return RatePoint(lr, scores, diverged)


def _scores_at(rates: Sequence[RatePoint], lr: float | None) -> Mapping[int, float]:
    return next((point.scores for point in rates if point.lr == lr), {})


def _curve(runs: Sequence[Run], metric: str, level: float) -> tuple[CurvePoint, ...]:
    """Return the mean curve over the steps at which every run was evaluated."""
    tables = [{row["step"]: row for row in run.rows if row.get(metric) is not None} for run in runs]
    if not tables:
        return ()
    shared = sorted(set.intersection(*(set(table) for table in tables)))
    points = []
    for step in shared:
        rows = [table[step] for table in tables]
        score = t_interval([float(row[metric]) for row in rows], level)
        points.append(CurvePoint(rows[0]["epoch"], step, fmean(row["seconds"] for row in rows), score))
    return tuple(points)
