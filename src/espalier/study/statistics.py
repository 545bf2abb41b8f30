"""The statistics of a comparison: pure functions on a few numbers."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from espalier.errors import EspalierError, require

UNLIMITED = (-math.inf, math.inf)
_EXACT_SEEDS = 16
_SLACK = 1e-12
"""Numbers that are closer than this share of the larger one differ by rounding alone."""

# Note [Scores of any size]
# A score of the user's own may be as large as a float can be, and then its square, a sum of a few such scores and even
# the difference of two of them overflow. So the largest is brought to between 1 and 2 by a power of two first, which
# changes no digit, and a difference that no float can hold counts as the largest float.


@dataclass(frozen=True)
class Interval:
    """A mean of ``n`` values and its confidence interval; both ends are NaN where n < 2."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def defined(self) -> bool:
        """Whether there is an interval at all."""
        return not math.isnan(self.low)

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside; False where there is no interval."""
        return self.defined and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class PairedDifference:
    """Arm minus baseline over shared seeds, with both intervals; the t interval decides."""

    t: Interval
    bootstrap: Interval
    p: float = math.nan
    """Of the exact permutation test (``sign_flip_p``), NaN where n < 2."""

    @property
    def shown(self) -> bool:
        """Whether the t interval excludes zero; otherwise the study shows no difference."""
        return self.t.excludes_zero


@dataclass(frozen=True)
class Window:
    """The learning rates that serve almost as well as the best, without a gap: from ``low`` to ``high``.

    An end is open where the outermost rate that was tried is still inside: the true window may be wider.
    """

    low: float
    high: float
    open_low: bool
    open_high: bool

    @property
    def ratio(self) -> float:
        """How many times larger the largest rate is than the smallest."""
        return self.high / self.low


def is_share(metric: str) -> bool:
    """Return whether a metric is a share of one."""
    return metric.endswith("accuracy")


def score_limits(metric: str) -> tuple[float, float]:
    """Return the least and the largest score that a metric can have: a share's, or a length's (``longest…``)."""
    if is_share(metric):
        return 0.0, 1.0
    return (0.0, math.inf) if metric.startswith("longest") else UNLIMITED


def mean_of(values: Sequence[float]) -> float:
    """Return the mean of finite values, which lies between the smallest and the largest of them.

    Raises:
        EspalierError: no value, or one that is not finite.
    """
    _check(values)
    scale = _scale(values)
    mean = math.fsum(value / scale for value in values) / len(values) * scale
    return min(max(mean, min(values)), max(values))


def difference_of(value: float, other: float) -> float:
    """Return ``value - other``, at most the largest float (Note [Scores of any size])."""
    return min(max(value - other, -sys.float_info.max), sys.float_info.max)


def t_interval(values: Sequence[float], level: float = 0.95, limits: tuple[float, float] = UNLIMITED) -> Interval:
    """Return the mean and Student's interval ``mean ± t_{n−1, (1+level)/2} · s/√n``, cut at the limits.

    Assumes independent values that scatter normally. Its coverage is right at any n when they do; with one value
    there is no interval. The mean of values that lie within limits lies within them, too, so that cutting the interval
    there takes nothing from its coverage.

    Args:
        values: one a seed.
        level: confidence level.
        limits: the least and the largest that a value can be: (0, 1) for a share.

    Raises:
        EspalierError: no value, one that is not finite or outside the limits, or a level outside (0, 1).
    """
    _check(values, level)
    for value in values:
        if not limits[0] - _SLACK <= value <= limits[1] + _SLACK:
            raise EspalierError(f"values: {value:g} lies outside the limits {limits}: look for where it comes from")
    values = [_within(value, limits) for value in values]
    mean, n = mean_of(values), len(values)
    if n < 2:
        return Interval(mean, math.nan, math.nan, n)
    scale = _scale(values)
    # scipy's t.interval and ttest_1samp give NaN, or warn, where all values are equal: shares often are.
    deviation = math.sqrt(math.fsum((value / scale - mean / scale) ** 2 for value in values) / (n - 1))
    half = float(require("scipy.stats", "train").t.ppf((1 + level) / 2, n - 1)) * deviation / math.sqrt(n) * scale
    return Interval(mean, _within(mean - half, limits), _within(mean + half, limits), n)


def bootstrap_interval(
    values: Sequence[float], level: float = 0.95, *, resamples: int = 10_000, generator: torch.Generator
) -> Interval:
    """Return the mean and its percentile bootstrap interval.

    Resampled means are drawn with replacement and their ``(1 ± level)/2`` quantiles taken; no correction (BCa needs
    more values than a study has seeds to estimate its two constants). With few values it is too narrow: the 95 %
    interval of three is their range, which holds the mean of a symmetric law in 75 % of cases. So it stands beside the
    t interval, as a look at the scatter without the normal law, and does not decide.

    Raises:
        EspalierError: no value, or a level outside (0, 1).
    """
    _check(values, level)
    mean, n = mean_of(values), len(values)
    if n < 2:
        return Interval(mean, math.nan, math.nan, n)
    # scipy.stats.bootstrap gives NaN for equal values, and takes NumPy's generators, not torch's.
    picks_RN = torch.randint(n, (resamples, n), generator=generator)
    scale = _scale(values)
    means_R = torch.tensor([value / scale for value in values], dtype=torch.float64)[picks_RN].mean(1)
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(means_R, tails).tolist()
    return Interval(mean, low * scale, high * scale, n)


def paired_difference(
    arm: Mapping[int, float],
    baseline: Mapping[int, float],
    level: float = 0.95,
    *,
    limits: tuple[float, float] = UNLIMITED,
    generator: torch.Generator,
) -> PairedDifference | None:
    """Return the mean difference over the seeds that both have, with both intervals; None where they share none.

    Seeds of both arms start from the same base weights and see the same batches, so the differences scatter less than
    the scores.

    Args:
        arm: score by seed.
        baseline: score by seed.
        level: confidence level.
        limits: of a score; a difference lies within ± their distance.
        generator: source of the resamples.
    """
    differences = [difference_of(arm[seed], baseline[seed]) for seed in sorted(arm.keys() & baseline.keys())]
    if not differences:
        return None
    bootstrap = bootstrap_interval(differences, level, generator=generator)
    width = limits[1] - limits[0]
    return PairedDifference(t_interval(differences, level, (-width, width)), bootstrap, sign_flip_p(differences))


def sign_flip_p(differences: Sequence[float]) -> float:
    """Return the two-sided p of the exact paired permutation test, NaN for one difference.

    If the arms do not differ, each seed's difference is as likely as its opposite: p is the share of all 2ⁿ choices of
    signs whose mean is as far from zero as the one that was seen. With n seeds it cannot fall below 2/2ⁿ (0.25 for
    three, 0.06 for five, 0.002 for ten), whatever the effect. From 17 seeds on, 65,536 random choices are taken.

    Raises:
        EspalierError: no difference, or one that is not finite.
    """
    _check(differences)
    if (n := len(differences)) == 1:
        return math.nan
    stats, numpy = require("scipy.stats", "train"), require("numpy", "train")
    values = numpy.asarray(differences, dtype=float)
    values = values / (float(numpy.abs(values).max()) or 1.0)

    def mean(x: Any, axis: int) -> Any:
        # Means that differ by rounding alone are equal: a tie counts.
        return numpy.round(numpy.mean(x, axis=axis), 12)

    # With as many resamples as there are choices of signs, scipy takes each of them once and draws nothing.
    resamples, rng = 2 ** min(n, _EXACT_SEEDS), numpy.random.default_rng(0)
    test = {"permutation_type": "samples", "n_resamples": resamples, "vectorized": True, "rng": rng}
    return float(stats.permutation_test((values,), mean, **test).pvalue)


def best_rate(means: Mapping[float, float]) -> float | None:
    """Return the rate with the highest mean score (the smaller of equal ones), None where there is none.

    The scores that choose the rate are those that are then reported, so the chosen one's mean is biased upwards, more
    so the more rates are tried and the fewer seeds they have. Every arm gets the same rates and so the same chance.
    """
    return min(means, key=lambda lr: (-means[lr], lr)) if means else None


def rate_window(means: Mapping[float, float], tried: Sequence[float], tolerance: float) -> Window | None:
    """Return the unbroken range of rates around the best whose mean score is within ``tolerance`` of the best.

    Args:
        means: mean score by rate, of the rates that may count (no diverged run).
        tried: every rate of the arm; one without a mean ends the window.
        tolerance: in units of the score.
    """
    best = best_rate(means)
    if best is None:
        return None
    rates = sorted(tried)
    # A rate that is the tolerance below the best by its decimals lies inside, whatever rounding makes of them.
    floor = means[best] - tolerance - _SLACK * max(abs(means[best]), abs(tolerance))
    low = high = rates.index(best)
    while low > 0 and means.get(rates[low - 1], -math.inf) >= floor:
        low -= 1
    while high < len(rates) - 1 and means.get(rates[high + 1], -math.inf) >= floor:
        high += 1
    return Window(rates[low], rates[high], open_low=low == 0, open_high=high == len(rates) - 1)


def first_crossing(places: Sequence[float], values: Sequence[float], target: float) -> float:
    """Return the first place at which the line through the points reaches ``target`` from below, NaN if it never does.

    Args:
        places: increasing, e.g. epochs or steps.
        values: one a place.
        target: the value to reach.
    """
    for index, value in enumerate(values):
        if value >= target:
            if index == 0:
                return float(places[0])
            # Halves: the difference of two floats may be larger than a float.
            share = (target / 2 - values[index - 1] / 2) / (value / 2 - values[index - 1] / 2)
            return places[index - 1] + share * (places[index] - places[index - 1])
    return math.nan


def spread(count: int, shown: int) -> list[int]:
    """Return up to ``shown`` indices below ``count``, evenly spread: the first and the last, or the first alone."""
    if count <= shown:
        return list(range(count))
    if shown < 2:
        return [0] * shown
    return [round(index * (count - 1) / (shown - 1)) for index in range(shown)]


def _check(values: Sequence[float], level: float = 0.95) -> None:
    if not values:
        raise EspalierError("values is empty: there is nothing to test or to average")
    for value in values:
        if not math.isfinite(value):
            raise EspalierError(f"values: {value} is not finite: leave out the runs that diverged")
    if not 0 < level < 1:
        raise EspalierError(f"level {level} must lie in (0, 1), e.g. 0.95")


def _scale(values: Sequence[float]) -> float:
    """Return the power of two that brings the largest value to between 1 and 2 (Note [Scores of any size])."""
    largest = max(map(abs, values))
    return math.ldexp(1.0, math.frexp(largest)[1] - 1) if largest else 1.0


def _within(value: float, limits: tuple[float, float]) -> float:
    return min(max(value, limits[0]), limits[1])
