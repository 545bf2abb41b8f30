"""What a study found, arm by arm, with the number of runs behind every number."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from espalier.errors import EspalierError, require_known
from espalier.randomness import derive_generator
from espalier.recipes import Recipe
from espalier.study.record import Record
from espalier.study.statistics import (
    Interval,
    PairedDifference,
    Window,
    best_rate,
    first_crossing,
    is_share,
    mean_of,
    paired_difference,
    rate_window,
    score_limits,
    t_interval,
)
from espalier.study.trial import Study, Trial, load_study
from espalier.train import Run, load_run
from espalier.train.run import RESULT

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
        return mean_of(list(self.scores.values())) if self.scores else math.nan


@dataclass(frozen=True)
class CurvePoint:
    """A step at which a run of an arm at its best rate was evaluated: the scores of all seeds there."""

    epoch: float
    step: int
    score: Interval


@dataclass(frozen=True)
class ArmSummary:
    """What the study says of one arm; None and NaN stand where there are too few runs to say it."""

    arm: str
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
    records: Mapping[Path, Record] = field(repr=False)
    """What the finished trials left behind, by folder, whether or not the folder is here."""

    @property
    def is_share(self) -> bool:
        """Whether scores are shares of one: they read better in percent, and no interval leaves 0 to 100 %."""
        return is_share(self.metric)

    @property
    def unit(self) -> str:
        """What curves are drawn over: epochs of a recipe, steps of a training function."""
        return "epoch" if isinstance(self.study.recipe, Recipe) else "step"

    def difference(self, arm: str, baseline: str) -> PairedDifference | None:
        """Return the difference of two arms over their shared seeds, each at its own best rate; None without any.

        Raises:
            EspalierError: the study has no such arm.
        """
        known = {each.arm: each for each in self.arms}
        for name in (arm, baseline):
            require_known("arm of this study", name, known)
        one = known[arm]
        return _paired(arm, _scores_at(one.rates, one.best_lr), known[baseline], self.metric, self.level)

    def run(self, arm: str, lr: float, seed: int) -> Run | None:
        """Return one finished run, None where there is none or its folder is not here."""
        trial = self.study.trial(arm, lr, seed)
        ended = isinstance(trial.recipe, Recipe) and (trial.path / RESULT).exists()
        return load_run(trial.path) if ended else None


def summarise(study: Study | Path | str, *, level: float = LEVEL, tolerance: float = TOLERANCE) -> Summary:
    """Summarise the finished trials of a study; what is missing, diverged or failed is counted, never hidden.

    Records and run folders serve alike.

    A diverged run has no score. A rate at which any seed diverged can neither be the best nor lie in the window:
    leaving such seeds out of a mean would favour the arm that diverges.

    Args:
        study: the study, or its folder.
        level: confidence level of every interval.
        tolerance: how far below the best mean score a rate may lie to count for the window, in units of the score.

    Raises:
        EspalierError: not a study folder, a damaged run in it, a level outside (0, 1) or a tolerance below 0.
    """
    if not tolerance >= 0:
        raise EspalierError(f"tolerance is {tolerance}: give a number from 0, in units of the score")
    study = study if isinstance(study, Study) else load_study(study)
    trials = study.trials()
    records = study.outcomes()
    metric = next((record.metric for record in records.values()), "score")
    arms: list[ArmSummary] = []
    for arm in study.arms:
        mine = [trial for trial in trials if trial.arm == arm]
        arms.append(_summarise_arm(study, mine, records, metric, arms[0] if arms else None, level, tolerance))
    failures = tuple((trial, text) for trial in trials if (text := trial.failure) is not None)
    return Summary(study, metric, level, tolerance, tuple(arms), failures, records)


def _summarise_arm(
    study: Study,
    trials: Sequence[Trial],
    records: Mapping[Path, Record],
    metric: str,
    baseline: ArmSummary | None,
    level: float,
    tolerance: float,
) -> ArmSummary:
    arm = trials[0].arm
    rates = tuple(_rate_point(lr, [trial for trial in trials if trial.lr == lr], records) for lr in study.lrs)
    means = _means(rates)
    best = best_rate(means)
    scores = _scores_at(rates, best)
    mine = [records[trial.path] for trial in trials if trial.path in records]
    curve = _curve([record for record in mine if record.lr == best], score_limits(metric), level)
    times = [record.step_seconds for record in mine if record.step_seconds is not None]
    step_seconds = median(times) if times else math.nan
    score = t_interval(list(scores.values()), level, score_limits(metric)) if scores else None
    target = baseline.score if baseline else score
    goal = target.mean if target else math.nan
    values = [point.score.mean for point in curve]
    return ArmSummary(
        arm=arm,
        rates=rates,
        best_lr=best,
        window=rate_window(means, study.lrs, tolerance),
        score=score,
        difference=None if baseline is None else _paired(arm, scores, baseline, metric, level),
        curve=curve,
        epochs_to_baseline=first_crossing([point.epoch for point in curve], values, goal),
        steps_to_baseline=first_crossing([point.step for point in curve], values, goal),
        epochs=max((record.epochs for record in mine), default=0),
        step_seconds=step_seconds,
        step_ratio=step_seconds / (baseline.step_seconds if baseline else step_seconds),
        planned=len(trials),
        finished=len(mine),
        diverged=sum(len(point.diverged) for point in rates),
        failed=sum(trial.failure is not None for trial in trials),
    )


def _means(rates: Sequence[RatePoint]) -> dict[float, float]:
    """Return the mean of every rate that counts, over the seeds that all of them have, if there are any."""
    points = [point for point in rates if point.counts]
    seeds = set.intersection(*({*point.scores} for point in points)) if points else set()
    return {p.lr: mean_of([s for seed, s in p.scores.items() if seed in seeds or not seeds]) for p in points}


def _paired(
    arm: str, scores: Mapping[int, float], baseline: ArmSummary, metric: str, level: float
) -> PairedDifference | None:
    theirs = _scores_at(baseline.rates, baseline.best_lr)
    generator = derive_generator(0, "bootstrap", arm)
    return paired_difference(scores, theirs, level, limits=score_limits(metric), generator=generator)


def _rate_point(lr: float, trials: Sequence[Trial], records: Mapping[Path, Record]) -> RatePoint:
    found = {trial.seed: records[trial.path] for trial in trials if trial.path in records}
    diverged = tuple(seed for seed, record in found.items() if record.diverged)
    return RatePoint(lr, {seed: record.score for seed, record in found.items() if record.score is not None}, diverged)


def _scores_at(rates: Sequence[RatePoint], lr: float | None) -> Mapping[int, float]:
    return next((point.scores for point in rates if point.lr == lr), {})


def _curve(records: Sequence[Record], limits: tuple[float, float], level: float) -> tuple[CurvePoint, ...]:
    """Return the mean curve over the steps at which any run was evaluated, from where every run has begun.

    A run may have been evaluated at other steps than the others, or have stopped early, and a record keeps only a part
    of a long curve: between its evaluations a run's score is taken to be linear, and after its last one to stay.
    """
    tables = [{step: (epoch, score) for epoch, step, _, score in record.curve} for record in records]
    for record, table in zip(records, tables, strict=True):
        # A curve keeps fewer digits than its score: an arm would end below its own mean, and never reach it.
        if record.curve and record.score is not None:
            epoch, step, _, _ = record.curve[-1]
            table[step] = (epoch, record.score)
    if not tables or not all(tables):
        return ()
    epochs = {step: epoch for table in tables for step, (epoch, _) in table.items()}
    first = max(map(min, tables))
    return tuple(
        CurvePoint(epochs[step], step, t_interval([_score_at(table, step) for table in tables], level, limits))
        for step in sorted(epochs)
        if step >= first
    )


def _score_at(table: Mapping[int, tuple[float, float]], step: int) -> float:
    steps = sorted(table)
    after = bisect_left(steps, step)
    if after == len(steps) or steps[after] == step:
        return table[steps[min(after, len(steps) - 1)]][1]
    low, high = steps[after - 1], steps[after]
    share = (step - low) / (high - low)
    return (1 - share) * table[low][1] + share * table[high][1]
