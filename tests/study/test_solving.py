"""Shares of runs that solve a task: against exact sums over the binomial and the hypergeometric, and plain loops."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.errors import EspalierError
from espalier.recipes import get_recipe
from espalier.study import Summary, markdown_table, plan_study, summarise
from espalier.study.solving import exact_share, fisher_p, log_rate_area, measure_solving
from espalier.study.statistics import sign_flip_p, t_interval
from fabricated_runs import fabricate

RECIPE = replace(get_recipe("digits_vit"), epochs=2, warmup_epochs=0.0)
LRS = (1e-4, 1e-3, 1e-2)
counts = st.integers(1, 12).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


def at_least(k: int, n: int, p: float) -> float:
    """Return P(X ≥ k) of a binomial, term by term."""
    return math.fsum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))


@settings(deadline=None, max_examples=80)
@given(counts, st.sampled_from([0.8, 0.95, 0.99]))
def test_exact_interval_is_where_the_binomial_tails_are(count: tuple[int, int], level: float) -> None:
    k, n = count
    share, tail = exact_share(k, n, level), (1 - level) / 2
    assert 0 <= share.low <= share.value <= share.high <= 1
    if k == 0:
        assert share.low == 0
    else:
        assert at_least(k, n, share.low) == pytest.approx(tail, rel=1e-6)
    if k == n:
        assert share.high == 1
    else:
        assert 1 - at_least(k + 1, n, share.high) == pytest.approx(tail, rel=1e-6)


def test_exact_interval_covers_at_least_as_often_as_it_says() -> None:
    for n in (3, 8):
        for truth in (0.01, 0.2, 0.5, 0.77):
            covered = [k for k in range(n + 1) if exact_share(k, n).low <= truth <= exact_share(k, n).high]
            weights = [math.comb(n, k) * truth**k * (1 - truth) ** (n - k) for k in covered]
            assert math.fsum(weights) >= 0.95


@settings(deadline=None, max_examples=80)
@given(counts, counts)
def test_fisher_against_the_hypergeometric_sum(one: tuple[int, int], other: tuple[int, int]) -> None:
    (a, n), (b, m) = one, other
    total = a + b
    ways = {k: math.comb(n, k) * math.comb(m, total - k) for k in range(max(0, total - m), min(n, total) + 1)}
    expected = sum(way for way in ways.values() if way <= ways[a]) / sum(ways.values())
    assert fisher_p(exact_share(a, n), exact_share(b, m)) == pytest.approx(expected)


def test_counts_that_are_no_share_are_refused() -> None:
    with pytest.raises(EspalierError, match="solved 4 of 3"):
        exact_share(4, 3)
    assert (exact_share(0, 0).low, exact_share(0, 0).high) == (0, 1)
    assert fisher_p(exact_share(0, 0), exact_share(1, 3)) == 1


@given(st.dictionaries(st.floats(1e-5, 1.0), st.floats(0, 1), min_size=2, max_size=9))
def test_area_is_the_mean_of_the_line_over_log_rate(scores: dict[float, float]) -> None:
    rates = sorted(scores)
    if math.log(rates[-1]) - math.log(rates[0]) < 1e-6:
        return
    area = log_rate_area(scores)
    assert min(scores.values()) - 1e-9 <= area <= max(scores.values()) + 1e-9
    steps = 4000
    total = 0.0
    for step in range(steps):
        place = math.log(rates[0]) + (step + 0.5) / steps * math.log(rates[-1] / rates[0])
        index = next((i for i in range(len(rates) - 2) if place < math.log(rates[i + 1])), len(rates) - 2)
        left, right = math.log(rates[index]), math.log(rates[index + 1])
        weight = (place - left) / (right - left) if right > left else 0.0
        total += scores[rates[index]] * (1 - weight) + scores[rates[index + 1]] * weight
    assert area == pytest.approx(total / steps, abs=2e-3)


def test_area_by_hand() -> None:
    assert log_rate_area({1e-4: 0.0, 1e-3: 1.0, 1e-2: 1.0}) == pytest.approx(0.75)
    assert math.isnan(log_rate_area({1e-3: 0.5}))


def recall_study(folder: Path, scores: dict[str, dict[float, list[float | None]]]) -> Summary:
    """Return the summary of a study whose runs end at given scores; None diverged."""
    study = plan_study(RECIPE, list(scores), LRS, range(len(scores["default"][LRS[0]])), folder)
    for trial in study.trials():
        fabricate(trial.recipe, trial.path, scores[trial.arm][trial.lr][trial.seed])
    return summarise(folder)


SCORES: dict[str, dict[float, list[float | None]]] = {
    "default": {1e-4: [0.1, 0.2, 0.1], 1e-3: [0.13, 0.63, 0.93], 1e-2: [0.95, None, 0.2]},
    "mimetic": {1e-4: [0.95, 0.5, 0.9], 1e-3: [0.98, 0.99, 0.98], 1e-2: [0.91, 0.99, 0.3]},
}


def test_shares_of_a_study_by_hand(tmp_path: Path) -> None:
    default, mimetic = measure_solving(recall_study(tmp_path, SCORES))
    assert (default.solved.solved, default.solved.runs) == (2, 9)
    assert (mimetic.solved.solved, mimetic.solved.runs) == (7, 9)
    assert [share.solved for share in default.by_rate] == [0, 1, 1]
    assert [share.runs for share in default.by_rate] == [3, 3, 3]
    # Seeds solve 1, 0, 1 of three rates by default and 3, 2, 2 with structure.
    assert mimetic.p == sign_flip_p([2 / 3, 2 / 3, 1 / 3])
    assert mimetic.p_by_rate[1] == pytest.approx(0.4)
    areas = [0.25 * s[0] + 0.5 * s[1] + 0.25 * s[2] for s in ((0.1, 0.13, 0.95), (0.2, 0.63, 0), (0.1, 0.93, 0.2))]
    expected = t_interval(areas, limits=(0.0, 1.0))
    assert (default.area.low, default.area.mean, default.area.high) == pytest.approx(
        (expected.low, expected.mean, expected.high)
    )
    assert mimetic.area_difference.t.mean == pytest.approx(mimetic.area.mean - default.area.mean)


def test_the_page_says_it(tmp_path: Path) -> None:
    text = markdown_table(recall_study(tmp_path, SCORES))
    assert "| default | 2 of 9 (22 % [3, 60]) | baseline |" in text
    assert "| mimetic | 7 of 9 (78 % [40, 97]) | 0.25 |" in text
    assert "| 0.001 | 1 of 3 (33 % [1, 91]) | 3 of 3 (100 % [29, 100]), p = 0.4 |" in text
    for interval in _brackets(text):
        assert all(-100 <= end <= 100 for end in interval), interval


def test_nothing_is_said_of_a_task_that_nobody_solves(tmp_path: Path) -> None:
    low = {arm: {lr: [0.5, 0.4] for lr in LRS} for arm in ("default", "mimetic")}
    assert "Runs that reach" not in markdown_table(recall_study(tmp_path, low))


def _brackets(text: str) -> list[list[float]]:
    found = re.findall(r"\[([−+]?[\d.]+), ([−+]?[\d.]+)\]", text)
    return [[float(end.replace("−", "-")) for end in pair] for pair in found]
