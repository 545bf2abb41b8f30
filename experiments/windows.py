"""Is one arm's window of learning rates wider than another's: the ratio of their widths, bootstrapped over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from espalier.randomness import derive_generator
from espalier.study import Summary
from espalier.study.statistics import Interval, rate_window

Scores = Mapping[float, Mapping[int, float]]
"""Score by rate and seed; a diverged run counts as 0."""
TOLERANCE, THRESHOLD = 0.02, 0.9


def width_near_best(means: Mapping[float, float]) -> float:
    """Return how many times the largest is the smallest of the rates within 2 points of the best, without a gap."""
    window = rate_window(means, list(means), TOLERANCE)
    return 1.0 if window is None else window.ratio


def width_solving(means: Mapping[float, float]) -> float:
    """Return the same of the rates whose mean score reaches 90 %; 1 where none or one does."""
    solving = [lr for lr, mean in means.items() if mean >= THRESHOLD]
    return max(solving) / min(solving) if solving else 1.0


DEFINITIONS: Mapping[str, Callable[[Mapping[float, float]], float]] = {
    "within 2 points of the best": width_near_best,
    "mean of 90 %": width_solving,
}


def scores_of(summary: Summary, arm: str) -> Scores:
    """Return an arm's scores, a diverged run's as 0."""
    (found,) = [each for each in summary.arms if each.arm == arm]
    return {point.lr: {**dict.fromkeys(point.diverged, 0.0), **point.scores} for point in found.rates}


def log_width_ratio(
    arm: Scores, baseline: Scores, width: Callable[[Mapping[float, float]], float], resamples: int = 2000
) -> Interval | None:
    """Return log10 of the ratio of the two widths with its percentile bootstrap interval over paired seeds.

    Args:
        arm: its scores.
        baseline: the other's, at the same rates.
        width: of a window, from the mean score by rate.
        resamples: bootstrap resamples of the seeds.

    Returns:
        None where no seed has run at every rate of both.
    """
    seeds = sorted(set.intersection(*(set(scores) for side in (arm, baseline) for scores in side.values())))
    if not seeds:
        return None

    def ratio(chosen: Sequence[int]) -> float:
        widths = [
            width({lr: sum(scores[seed] for seed in chosen) / len(chosen) for lr, scores in side.items()})
            for side in (arm, baseline)
        ]
        return math.log10(widths[0] / widths[1])

    generator = derive_generator(0, "windows")
    picks_RN = torch.randint(len(seeds), (resamples, len(seeds)), generator=generator).tolist()
    drawn = sorted(ratio([seeds[pick] for pick in picks]) for picks in picks_RN)
    if len(seeds) < 2:
        return Interval(ratio(seeds), math.nan, math.nan, len(seeds))
    return Interval(ratio(seeds), drawn[int(0.025 * resamples)], drawn[int(0.975 * resamples) - 1], len(seeds))
