"""Statistics for scores that are all or nothing: which share of the runs solves the task, and how forgiving a start is.

On recall a run ends near chance or near 100 %, so the mean over three seeds and its t interval say little.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from espalier.errors import EspalierError, require
from espalier.randomness import derive_generator
from espalier.study.statistics import Interval, PairedDifference, paired_difference, sign_flip_p, t_interval
from espalier.study.summary import ArmSummary, Summary

THRESHOLD = 0.9
"""Score from which a run has solved its task."""


@dataclass(frozen=True)
class Share:
    """How many of ``runs`` solved the task, and the exact interval of the share."""

    solved: int
    runs: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """The share itself, NaN without runs."""
        return self.solved / self.runs if self.runs else math.nan


@dataclass(frozen=True)
class Solving:
    """What one arm's runs solve; comparisons are with the baseline and None for the baseline itself."""

    arm: str
    solved: Share
    """Over all rates and seeds; a diverged run has not solved it."""
    p: float | None
    """Of the exact permutation test over paired seeds, on each seed's share of solved runs."""
    by_rate: tuple[Share, ...]
    """At each rate of the study."""
    p_by_rate: tuple[float, ...] | None
    """Of Fisher's exact test at each rate."""
    area: Interval | None
    """Mean over seeds of the area under score over log rate (``log_rate_area``)."""
    area_difference: PairedDifference | None


def exact_share(solved: int, runs: int, level: float = 0.95) -> Share:
    """Return a share with its exact (Clopper–Pearson) interval, which covers the truth at least as often as it says.

    Raises:
        EspalierError: counts that are no share.
    """
    if not 0 <= solved <= runs:
        raise EspalierError(f"solved {solved} of {runs}: give counts with 0 ≤ solved ≤ runs")
    if runs == 0:
        return Share(0, 0, 0.0, 1.0)
    interval = require("scipy.stats", "train").binomtest(solved, runs).proportion_ci(level, method="exact")
    return Share(solved, runs, float(interval.low), float(interval.high))


def fisher_p(one: Share, other: Share) -> float:
    """Return the two-sided p of Fisher's exact test of two shares, 1 where a side has no runs."""
    if not (one.runs and other.runs):
        return 1.0
    table = [[one.solved, one.runs - one.solved], [other.solved, other.runs - other.solved]]
    return float(require("scipy.stats", "train").fisher_exact(table).pvalue)


def log_rate_area(scores: Mapping[float, float]) -> float:
    """Return the mean score over log rate: the area under the line through the points, over its width.

    One figure for how forgiving a start is: of two arms with the same best score, the one with the larger area loses
    less at rates that are not the best. NaN for fewer than two rates.

    Args:
        scores: score by rate.
    """
    rates = sorted(scores)
    if len(rates) < 2:
        return math.nan
    logs = torch.tensor(rates, dtype=torch.float64).log()
    area = torch.trapezoid(torch.tensor([scores[rate] for rate in rates], dtype=torch.float64), logs)
    return float(area / (logs[-1] - logs[0]))


def measure_solving(summary: Summary) -> list[Solving]:
    """Return what every arm of a study, whose scores are shares of one, solves."""
    rows: list[Solving] = []
    for arm in summary.arms:
        by_rate = tuple(
            exact_share(
                sum(score >= THRESHOLD for score in point.scores.values()),
                len(point.scores) + len(point.diverged),
                summary.level,
            )
            for point in arm.rates
        )
        solved = exact_share(sum(s.solved for s in by_rate), sum(s.runs for s in by_rate), summary.level)
        ended = _ended(arm)
        areas = {seed: log_rate_area(scores) for seed, scores in ended.items()} if len(arm.rates) > 1 else {}
        shares = {seed: sum(s >= THRESHOLD for s in scores.values()) / len(scores) for seed, scores in ended.items()}
        area = t_interval(list(areas.values()), summary.level, (0.0, 1.0)) if areas else None
        if not rows:
            base_areas, base_shares = areas, shares
            rows.append(Solving(arm.arm, solved, None, by_rate, None, area, None))
            continue
        gaps = [shares[seed] - base_shares[seed] for seed in sorted(shares.keys() & base_shares.keys())]
        difference = paired_difference(
            areas, base_areas, summary.level, limits=(0.0, 1.0), generator=derive_generator(0, "area", arm.arm)
        )
        p_by_rate = tuple(fisher_p(one, other) for one, other in zip(by_rate, rows[0].by_rate, strict=True))
        rows.append(
            Solving(arm.arm, solved, sign_flip_p(gaps) if gaps else math.nan, by_rate, p_by_rate, area, difference)
        )
    return rows


def _ended(arm: ArmSummary) -> dict[int, dict[float, float]]:
    """Return the scores by rate of every seed whose run has ended at every rate."""
    seeds = set.intersection(*({*point.scores, *point.diverged} for point in arm.rates))
    # A diverged run counts as 0: leaving it out would favour the arm that diverges.
    return {seed: {point.lr: point.scores.get(seed, 0.0) for point in arm.rates} for seed in sorted(seeds)}
