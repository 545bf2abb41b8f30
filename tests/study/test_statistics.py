from __future__ import annotations

import itertools
import math
import sys
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from espalier.errors import EspalierError
from espalier.study.statistics import (
    best_rate,
    bootstrap_interval,
    first_crossing,
    mean_of,
    paired_difference,
    rate_window,
    score_limits,
    sign_flip_p,
    t_interval,
)

scores = st.lists(st.floats(-10, 10), min_size=2, max_size=8)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(deadline=None, max_examples=50)
@given(values=scores, level=st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_t_interval_is_scipys(values: list[float], level: float) -> None:
    ours = t_interval(values, level)
    if np.ptp(values) < 1e-9:  # scipy warns of lost precision there
        assert ours.low == pytest.approx(ours.high, abs=1e-6)
        return
    theirs = scipy.stats.ttest_1samp(values, 0).confidence_interval(level)
    assert ours.low == pytest.approx(theirs.low, abs=1e-9)
    assert ours.high == pytest.approx(theirs.high, abs=1e-9)
    assert ours.n == len(values)


def test_t_interval_of_three_by_hand() -> None:
    # mean 2, s = 1, t_{2, 0.975} = 4.302653: half width 4.302653 / √3.
    interval = t_interval([1.0, 2.0, 3.0])
    assert interval.mean == 2
    assert interval.high - 2 == pytest.approx(4.302652729911275 / math.sqrt(3), rel=1e-9)
    assert not interval.excludes_zero
    assert t_interval([11.0, 12.0, 13.0]).excludes_zero
    assert t_interval([-11.0, -12.0, -13.0]).excludes_zero


def test_one_value_has_no_interval_and_shows_nothing() -> None:
    for interval in (t_interval([0.5]), bootstrap_interval([0.5], generator=generator())):
        assert interval.mean == 0.5
        assert not interval.defined
        assert not interval.excludes_zero


def test_nothing_and_bad_levels_are_refused() -> None:
    with pytest.raises(EspalierError, match="empty"):
        t_interval([])
    with pytest.raises(EspalierError, match="level 95"):
        t_interval([1.0, 2.0], level=95)


def test_t_interval_covers_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).normal(3.0, 2.0, size=(2000, 3))
    covered = np.mean([low <= 3 <= high for low, high in ((i.low, i.high) for i in map(t_interval, draws.tolist()))])
    # Standard error of a share of 0.95 over 2000 draws: 0.005.
    assert covered == pytest.approx(0.95, abs=0.015)


def test_bootstrap_of_three_is_the_law_of_27_resamples() -> None:
    values = [0.0, 1.0, 5.0]
    means = sorted(sum(picks) / 3 for picks in itertools.product(values, repeat=3))
    ours = bootstrap_interval(values, 0.80, generator=generator(), resamples=100_000)
    # All 27 resamples are equally likely: the 10 % and 90 % quantiles lie on whole resampled means.
    assert ours.low == pytest.approx(means[2], abs=1e-12)
    assert ours.high == pytest.approx(means[24], abs=1e-12)
    wide = bootstrap_interval(values, 0.95, generator=generator(), resamples=100_000)
    assert (wide.low, wide.high) == (0.0, 5.0)  # 1/27 is more than 2.5 %


def test_bootstrap_agrees_with_scipy_and_is_repeatable() -> None:
    values = np.random.default_rng(1).normal(size=20)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(2)
    ).confidence_interval
    ours = bootstrap_interval(values.tolist(), generator=generator(), resamples=20_000)
    assert ours.low == pytest.approx(theirs.low, abs=0.02)
    assert ours.high == pytest.approx(theirs.high, abs=0.02)
    assert ours == bootstrap_interval(values.tolist(), generator=generator(), resamples=20_000)


def test_paired_difference_is_scipys_paired_test() -> None:
    rng = np.random.default_rng(3)
    baseline = {seed: float(value) for seed, value in enumerate(rng.normal(0.8, 0.1, 6))}
    arm = {seed: value + 0.02 + 0.005 * float(rng.normal()) for seed, value in baseline.items()}
    ours = paired_difference(arm, baseline, generator=generator())
    assert ours is not None
    theirs = scipy.stats.ttest_rel(list(arm.values()), list(baseline.values())).confidence_interval(0.95)
    assert (ours.t.low, ours.t.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    # Pairing takes the common scatter of 0.1 out.
    assert ours.shown
    assert scipy.stats.ttest_ind(list(arm.values()), list(baseline.values())).pvalue > 0.05


def test_only_shared_seeds_are_paired() -> None:
    ours = paired_difference({0: 1.0, 2: 2.0, 5: 9.0}, {2: 1.0, 0: 0.5, 7: 0.0}, generator=generator())
    assert ours is not None
    assert ours.t.n == 2
    assert ours.t.mean == 0.75
    assert paired_difference({0: 1.0}, {1: 1.0}, generator=generator()) is None


def test_difference_that_covers_zero_is_not_shown() -> None:
    base = dict.fromkeys(range(3), 0.0)
    assert not paired_difference({0: 0.01, 1: 0.03, 2: -0.01}, base, generator=generator()).shown
    assert not paired_difference({0: 0.5}, {0: 0.0}, generator=generator()).shown
    # All three above zero: the bootstrap excludes zero, the t interval does not, and the t interval decides.
    close = paired_difference({0: 0.01, 1: 0.03, 2: 0.002}, base, generator=generator())
    assert close.bootstrap.excludes_zero
    assert not close.shown


def test_window_is_unbroken_around_the_best() -> None:
    means = {1e-4: 0.90, 1e-3: 0.80, 3e-3: 0.91, 1e-2: 0.92, 3e-2: 0.905, 1e-1: 0.5}
    window = rate_window(means, list(means), tolerance=0.02)
    assert (window.low, window.high) == (3e-3, 3e-2)
    assert window.ratio == pytest.approx(10)
    assert not window.open_low
    assert not window.open_high


def test_window_ends_at_a_rate_that_diverged_and_is_open_at_the_edge() -> None:
    window = rate_window({1e-3: 0.9, 3e-3: 0.9, 3e-2: 0.9}, [1e-3, 3e-3, 1e-2, 3e-2], tolerance=0.01)
    assert (window.low, window.high, window.open_low, window.open_high) == (1e-3, 3e-3, True, False)
    assert rate_window({}, [1e-3], tolerance=0.01) is None


def test_best_rate_of_equal_ones_is_the_smallest() -> None:
    assert best_rate({1e-2: 0.9, 1e-3: 0.9, 1e-4: 0.8}) == 1e-3
    assert best_rate({}) is None


@settings(deadline=None, max_examples=50)
@given(means=st.dictionaries(st.floats(1e-5, 1.0), st.floats(0, 1), min_size=1, max_size=7), tolerance=st.floats(0, 1))
def test_window_against_its_definition(means: dict[float, float], tolerance: float) -> None:
    rates = sorted(means)
    best = max(means.values())
    floor = best - tolerance - 1e-12 * max(best, tolerance)  # equal by their decimals is equal
    window = rate_window(means, rates, tolerance)
    inside = [rate for rate in rates if window.low <= rate <= window.high]
    assert all(means[rate] >= floor for rate in inside)
    assert max(means.values()) in [means[rate] for rate in inside]
    for neighbour in (rates.index(window.low) - 1, rates.index(window.high) + 1):
        assert not 0 <= neighbour < len(rates) or means[rates[neighbour]] < floor


def test_first_crossing_by_hand() -> None:
    assert first_crossing([0, 10, 20], [0.1, 0.5, 0.9], 0.7) == pytest.approx(15)
    assert first_crossing([0, 10, 20, 30], [0.1, 0.8, 0.2, 0.9], 0.45) == pytest.approx(5)
    assert first_crossing([0, 10], [0.5, 0.9], 0.5) == 0
    assert first_crossing([0, 10], [0.1, 0.9], 0.9) == 10
    assert math.isnan(first_crossing([0, 10], [0.1, 0.2], 0.9))
    assert math.isnan(first_crossing([], [], 0.9))


@settings(deadline=None, max_examples=50)
@given(values=st.lists(st.floats(0, 1), min_size=2, max_size=10), target=st.floats(0, 1))
def test_first_crossing_against_a_fine_grid(values: list[float], target: float) -> None:
    grid = np.linspace(0, len(values) - 1, 4001)
    line = np.interp(grid, range(len(values)), values)
    hits = grid[line >= target]
    ours = first_crossing(range(len(values)), values, target)
    if math.isnan(ours):
        assert len(hits) == 0
    elif len(hits):
        # The grid may step over a peak that touches the target, never find an earlier crossing.
        assert ours <= hits[0] + 1e-9
        assert np.interp(ours, range(len(values)), values) >= target - 1e-9


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(0, 1) | st.sampled_from([0.0, 1.0]), min_size=2, max_size=8))
def test_an_interval_of_shares_stays_between_0_and_1(values: list[float]) -> None:
    free, cut = t_interval(values), t_interval(values, limits=(0.0, 1.0))
    assert 0.0 <= cut.low <= cut.mean <= cut.high + 1e-12 <= 1.0 + 1e-12
    assert (cut.low, cut.high) == pytest.approx((max(free.low, 0.0), min(free.high, 1.0)))
    difference = paired_difference(
        dict(enumerate(values)), dict(enumerate(reversed(values))), limits=(0.0, 1.0), generator=generator()
    )
    assert difference is not None
    assert -1.0 <= difference.t.low <= difference.t.high <= 1.0


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 30).map(float), min_size=2, max_size=8))
def test_no_interval_of_lengths_holds_a_length_below_0(values: list[float]) -> None:
    limits = score_limits("longest")
    free, cut = t_interval(values), t_interval(values, limits=limits)
    assert (cut.low, cut.high) == pytest.approx((max(free.low, 0.0), free.high))
    paired = dict(enumerate(values)), dict(enumerate(reversed(values)))
    difference = paired_difference(*paired, limits=limits, generator=generator())
    unlimited = paired_difference(*paired, generator=generator())
    assert difference == unlimited  # lengths may differ by any number


def test_cutting_at_the_limits_keeps_the_coverage() -> None:
    # Means of three Bernoulli-like scores: whenever the free interval covers the true mean, so does the cut one.
    stream = np.random.default_rng(0)
    for truth in (0.05, 0.5, 0.9):
        for _ in range(200):
            values = stream.beta(8 * truth, 8 * (1 - truth), size=3).tolist()
            free, cut = t_interval(values), t_interval(values, limits=(0.0, 1.0))
            assert (free.low <= truth <= free.high) == (cut.low <= truth <= cut.high)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(-5, 5), min_size=2, max_size=9))
@example([1, 4, -2, -1, -2])
def test_sign_flips_against_every_choice_of_signs(values: list[int]) -> None:
    # Whole numbers, so that equal sums are equal and no rounding decides a tie.
    sums = [
        abs(sum(s * v for s, v in zip(signs, values, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(values))
    ]
    expected = sum(total >= abs(sum(values)) for total in sums) / len(sums)
    assert sign_flip_p(values) == pytest.approx(expected)
    assert sign_flip_p([value / 7 for value in values]) == pytest.approx(expected)


def test_sign_flips_of_few_and_of_many_seeds() -> None:
    assert math.isnan(sign_flip_p([1.0]))
    assert sign_flip_p([1.0, 2.0, 3.0]) == 0.25
    assert sign_flip_p([1.0] * 10) == pytest.approx(2 / 1024)
    many = sign_flip_p([0.1] * 20)
    assert many == sign_flip_p([0.1] * 20) < 1e-3
    with pytest.raises(EspalierError, match="nothing to test"):
        sign_flip_p([])


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(st.floats(-1, 1).filter(lambda x: x == 0 or abs(x) > 1e-3), min_size=2, max_size=6),
    power=st.sampled_from([-1000, -600, 600, 1015]),
)
def test_intervals_and_p_scale_with_the_scores(values: list[float], power: int) -> None:
    """A power of two changes no digit, so every figure is the plain one times it, however large or small."""
    large, scale = [math.ldexp(value, power) for value in values], math.ldexp(1.0, power)
    plain, scaled = t_interval(values), t_interval(large)
    for name in ("mean", "low", "high"):
        assert getattr(scaled, name) / scale == pytest.approx(getattr(plain, name), rel=1e-12, abs=1e-300)
    ours, theirs = (bootstrap_interval(each, generator=generator(), resamples=50) for each in (large, values))
    assert ours.low / scale == theirs.low
    assert ours.high / scale == theirs.high
    assert sign_flip_p(large) == sign_flip_p(values)


def test_the_largest_floats_have_a_mean_an_interval_and_a_p() -> None:
    top = 1.7e308
    assert (t_interval([-top] * 3).mean, t_interval([-top] * 3).low) == (-top, -top)
    assert mean_of([top, top, -top, -top]) == 0
    assert sign_flip_p([top] * 3) == sign_flip_p([0.5] * 3) == 0.25
    apart = paired_difference(dict.fromkeys(range(3), top), dict.fromkeys(range(3), -top), generator=generator())
    assert apart is not None  # no float holds their difference
    assert apart.t.mean == apart.bootstrap.low == sys.float_info.max
    assert apart.shown
    assert first_crossing([0, 10], [-top, top], 0.0) == 5


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-1e308, 1e308), min_size=1, max_size=6))
def test_a_mean_lies_between_the_smallest_and_the_largest(values: list[float]) -> None:
    assert min(values) <= mean_of(values) <= max(values)
    exact = sum(map(Fraction, values)) / len(values)
    assert math.isclose(mean_of(values), float(exact), rel_tol=1e-15, abs_tol=max(map(abs, values)) * 1e-15)


@pytest.mark.parametrize("value", [7.5, -0.1, math.nan, math.inf])
def test_no_interval_of_values_that_no_score_can_have(value: float) -> None:
    with pytest.raises(EspalierError, match=r"^values: "):
        t_interval([value, value], limits=(0.0, 1.0))
    # What only rounding took over the edge is no reason to stop, and is not shown.
    edge = t_interval([1.0000000000000002] * 2, limits=(0.0, 1.0))
    assert (edge.mean, edge.low, edge.high) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(("best", "other"), [(0.90, 0.88), (0.20, 0.18), (0.98, 0.96), (1e200, 0.98e200)])
def test_a_rate_exactly_the_tolerance_below_the_best_is_in_the_window(best: float, other: float) -> None:
    tolerance = 0.02 if best < 1 else 0.02e200
    window = rate_window({1.0: best, 2.0: other}, [1.0, 2.0], tolerance)
    assert window is not None
    assert window.high == 2.0
    below = rate_window({1.0: best, 2.0: other - 1e-9 * best}, [1.0, 2.0], tolerance)
    assert below is not None
    assert below.high == 1.0
