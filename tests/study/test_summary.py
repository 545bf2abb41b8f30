from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

import espalier
from espalier.errors import EspalierError
from espalier.recipes import Recipe
from espalier.study import Summary, Trial, launch, markdown_table, plan_study, summarise, text_table
from espalier.study.table import rate_rows
from fabricated_runs import fabricate, fabricate_trial, usual_score
from small_study import recorded, train_study

RECIPE = Recipe(name="r", epochs=4)
LRS = [1e-4, 1e-3, 1e-2]


@pytest.fixture
def usual(tmp_path: Path) -> Summary:
    study = plan_study(RECIPE, ["default", "mimetic"], LRS, [0, 1, 2], tmp_path)
    launch(study, workers=0, run=fabricate_trial)
    return summarise(tmp_path, tolerance=0.02)


def test_usual_study_against_hand_computed_numbers(usual: Summary) -> None:
    default, mimetic = usual.arms
    assert usual.metric == "test/accuracy"
    assert (default.best_lr, mimetic.best_lr) == (1e-3, 1e-3)
    # Seeds score 0.79, 0.80, 0.81: s = 0.01, so ± 4.302653 · 0.01 / √3.
    assert default.score.mean == pytest.approx(0.80)
    assert default.score.high - default.score.mean == pytest.approx(4.302653 * 0.01 / math.sqrt(3), rel=1e-6)
    assert (default.window.low, default.window.high) == (1e-3, 1e-3)  # 4 points are lost a factor of ten away
    assert default.difference is None
    assert mimetic.difference.t.mean == pytest.approx(0.03)
    assert mimetic.difference.shown
    # From 0.1 to 0.83 in four epochs; 0.80 is passed at 4 · 0.70 / 0.73, after 20 steps an epoch.
    assert mimetic.epochs_to_baseline == pytest.approx(4 * 0.70 / 0.73)
    assert mimetic.steps_to_baseline == pytest.approx(80 * 0.70 / 0.73)
    assert default.epochs_to_baseline == pytest.approx(4)
    assert mimetic.step_ratio == 1
    assert (default.planned, default.finished, default.diverged, default.failed) == (9, 9, 0, 0)
    assert [point.score.n for point in default.curve] == [3] * 5
    assert default.curve[0].score.mean == pytest.approx(0.1)


def test_baseline_that_ends_at_its_best_reaches_its_own_score_whatever_the_digits(tmp_path: Path) -> None:
    study = plan_study(RECIPE, ["default"], [1e-3], [0, 1, 2], tmp_path)
    for trial in study.trials():
        fabricate(trial.recipe, trial.path, 307 / 360 + trial.seed / 720)  # which four decimals round down
    arm = summarise(tmp_path).arms[0]
    assert arm.epochs_to_baseline == pytest.approx(RECIPE.epochs)
    assert arm.curve[-1].score.mean == arm.score.mean


def test_wider_tolerance_opens_the_window(usual: Summary) -> None:
    wide = summarise(usual.study.path, tolerance=0.05).arms[0].window
    assert (wide.low, wide.high, wide.open_low, wide.open_high) == (1e-4, 1e-2, True, True)
    for tolerance in (-0.1, math.nan):
        with pytest.raises(EspalierError, match=f"tolerance is {tolerance}: give a number from 0"):
            summarise(usual.study.path, tolerance=tolerance)


def test_difference_pairs_seeds_at_each_arms_own_rate(tmp_path: Path) -> None:
    scores = {
        ("default", 1e-4): [0.70, 0.74, 0.66],
        ("default", 1e-3): [0.60, 0.61, 0.62],
        ("mimetic", 1e-4): [0.50, 0.51, 0.52],
        ("mimetic", 1e-3): [0.71, 0.76, 0.68],
    }
    study = plan_study(RECIPE, ["default", "mimetic"], [1e-4, 1e-3], [0, 1, 2], tmp_path)
    for trial in study.trials():
        fabricate(
            trial.recipe, trial.path, scores[trial.arm, trial.lr][trial.seed], step_seconds=0.01 * (trial.seed + 1)
        )
    mimetic = summarise(tmp_path).arms[1]
    theirs = scipy.stats.ttest_rel(scores["mimetic", 1e-3], scores["default", 1e-4]).confidence_interval(0.95)
    assert (mimetic.difference.t.low, mimetic.difference.t.high) == pytest.approx((theirs.low, theirs.high))
    assert mimetic.step_seconds == pytest.approx(0.02)


def test_a_rate_that_diverged_for_one_seed_cannot_win(tmp_path: Path) -> None:
    study = plan_study(RECIPE, ["default"], LRS, [0, 1], tmp_path)
    for trial in study.trials():
        best = trial.lr == 1e-2
        fabricate(
            trial.recipe, trial.path, None if best and trial.seed else 0.99 if best else usual_score(trial.recipe)
        )
    (arm,) = summarise(tmp_path).arms
    assert arm.best_lr == 1e-3
    assert arm.window.high == 1e-3
    assert arm.diverged == 1
    assert "1 diverged" in text_table(summarise(tmp_path))


def test_rates_are_compared_on_the_seeds_that_all_have(tmp_path: Path) -> None:
    by_seed = [0.1, 0.2, 0.6]

    def run(trial: Trial) -> None:  # a rate that fails where scores are low has the higher mean, and is the worse one
        if trial.lr == 1e-2 and trial.seed < 2:
            raise ValueError("no such thing")
        fabricate(trial.recipe, trial.path, by_seed[trial.seed] + (0.05 if trial.lr == 1e-3 else 0))

    launch(plan_study(RECIPE, ["default"], [1e-3, 1e-2], [0, 1, 2], tmp_path), workers=0, run=run)
    (arm,) = summarise(tmp_path).arms
    assert arm.best_lr == 1e-3
    assert arm.score.mean == pytest.approx(0.35)


def test_nothing_is_hidden_in_an_unfinished_study(tmp_path: Path) -> None:
    def run(trial: Trial) -> None:
        if trial.arm == "mimetic" and trial.seed == 1:
            raise ValueError("no | such\nthing")
        fabricate_trial(trial)

    study = plan_study(RECIPE, ["default", "mimetic"], [1e-3], [0, 1], tmp_path)
    launch(study, workers=0, run=run)
    plan_study(replace(RECIPE), ["default", "mimetic"], [1e-3], [2], tmp_path)
    summary = summarise(tmp_path)
    mimetic = summary.arms[1]
    assert (mimetic.planned, mimetic.finished, mimetic.failed) == (3, 1, 1)
    text = text_table(summary)
    assert "1 of 3, 1 failed, 1 unfinished" in text
    assert "2 of 3, 1 unfinished" in text
    assert "failed: mimetic lr=0.001 seed=1: ValueError: no | such thing" in text
    assert "mimetic against default: +3.0 points on one paired seed, no difference shown (n = 1" in text
    assert r"ValueError: no \| such thing" in markdown_table(summary)


def test_equal_failures_are_one_line_with_their_number(tmp_path: Path) -> None:
    def run(trial: Trial) -> None:
        raise ValueError("no such thing" if trial.seed else "another thing")

    study = plan_study(RECIPE, ["default", "mimetic"], LRS, range(3), tmp_path)
    assert len(launch(study, workers=0, run=run)) == 18
    lines = [line for line in text_table(summarise(study)).splitlines() if "failed, " in line and "first" in line]
    assert sorted(lines) == [
        "12 trials failed, default lr=0.0001 seed=1 first: ValueError: no such thing",
        "6 trials failed, default lr=0.0001 seed=0 first: ValueError: another thing",
    ]


def test_an_empty_study_has_a_table_of_dashes(tmp_path: Path) -> None:
    plan_study(RECIPE, ["default", "mimetic"], LRS, [0], tmp_path)
    summary = summarise(tmp_path)
    assert summary.arms[0].best_lr is None
    assert "0 of 3, 3 unfinished" in text_table(summary)
    assert "no paired runs to compare yet" in text_table(summary)


@pytest.mark.parametrize("lost", ["default", "mimetic"])
def test_an_arm_that_always_diverged_is_not_waited_for(tmp_path: Path, lost: str) -> None:
    study = plan_study(RECIPE, ["default", "mimetic"], LRS, [0], tmp_path)
    for trial in study.trials():
        assert isinstance(trial.recipe, Recipe)
        fabricate(trial.recipe, trial.path, None if trial.arm == lost else 0.5)
    said = text_table(summarise(tmp_path))
    assert f"mimetic against default: nothing to compare, all runs of {lost} diverged" in said


def test_words_of_the_table(usual: Summary) -> None:
    text = text_table(usual)
    assert "mimetic is +3.0 points over default, [+3.0, +3.0], 3 paired seeds" in text
    assert "80.0 [77.5, 82.5]" in text
    assert "× 1 " in text  # the window holds one of three rates
    assert "3.84 of 4" in text
    lines = markdown_table(usual).splitlines()
    assert lines[0].count("|") == lines[2].count("|") == lines[3].count("|")
    assert any("chosen on the scores that are reported" in line for line in lines)


def test_no_difference_is_called_that(tmp_path: Path) -> None:
    study = plan_study(RECIPE, ["default", "mimetic", "covariance"], [1e-3], [0, 1, 2], tmp_path)
    worse = {"default": [0.80, 0.80, 0.80], "mimetic": [0.80, 0.85, 0.78], "covariance": [0.70, 0.71, 0.70]}
    for trial in study.trials():
        fabricate(trial.recipe, trial.path, worse[trial.arm][trial.seed])
    text = text_table(summarise(tmp_path))
    assert "mimetic against default: no difference shown, +1.0 points [−" in text
    assert "covariance is −9.7 points under default, [−11.1, −8.2], 3 paired seeds" in text
    assert "not reached" in text


def test_rates_stand_beside_each_other_with_paired_differences(usual: Summary) -> None:
    rows = rate_rows(usual)
    assert [row[0] for row in rows] == [f"{lr:g}" for lr in usual.study.lrs]
    base, arm = usual.arms
    for row, ours, theirs in zip(rows, arm.rates, base.rates, strict=True):
        # The fabricated arm is three points better for every seed, so the paired interval has no width.
        assert row[2].endswith("(+3.0 [+3.0, +3.0])")
        assert row[1].split(" [")[0] == f"{100 * sum(theirs.scores.values()) / 3:.1f}"
        assert row[2].split(" [")[0] == f"{100 * sum(ours.scores.values()) / 3:.1f}"
    assert all("| " + " | ".join(row) + " |" in markdown_table(usual).splitlines() for row in rows)


def test_a_trained_study_against_scipy_on_the_runs_own_files(tmp_path: Path) -> None:
    study = train_study(tmp_path / "study")
    runs, summary = recorded(study), summarise(study.path)
    for arm in summary.arms:
        means = {lr: sum(runs[arm.arm, lr, seed][-1] for seed in study.seeds) / 2 for lr in study.lrs}
        assert arm.best_lr in [lr for lr in study.lrs if means[lr] == max(means.values())]
        finals = [runs[arm.arm, arm.best_lr, seed][-1] for seed in study.seeds]
        mean, half = means[arm.best_lr], scipy.stats.t.ppf(0.975, 1) * abs(finals[0] - finals[1]) / 2
        assert arm.score.mean == pytest.approx(mean)
        assert (arm.score.low, arm.score.high) == pytest.approx((max(mean - half, 0), min(mean + half, 1)))
    base, mimetic = summary.arms
    gains = [runs["mimetic", mimetic.best_lr, seed][-1] - runs["default", base.best_lr, seed][-1] for seed in (0, 1)]
    assert mimetic.difference.t.mean == pytest.approx(sum(gains) / 2)


def test_curves_of_any_steps_have_the_mean_of_their_lines(tmp_path: Path) -> None:
    """Runs that stop early, or are evaluated at steps of their own, and curves so long that records thin them."""

    def curve(arm: str, lr: float, seed: int, folder: Path) -> list[tuple[int, float]]:
        stride, count = (7, 30 + 9 * seed) if arm == "often" else (11 + seed, 3 + seed)
        return [(seed + stride * k, math.sin(k) - 5 / (k + 1)) for k in range(count)]

    summary = espalier.compare(curve, arms=["often", "seldom"], lrs=[1.0], seeds=3, out=tmp_path, workers=0)
    for arm in summary.arms:
        whole = [np.array(curve(arm.arm, 1.0, seed, tmp_path)).T for seed in range(3)]
        records = [record for record in summary.records.values() if record.arm == arm.arm]
        kept = [np.array([(step, score) for _, step, _, score in record.curve]).T for record in records]
        assert all(set(some[0]) <= set(each[0]) for some, each in zip(kept, whole, strict=True))
        steps = sorted({step for some in kept for step in some[0] if step >= 2})  # seed 2 begins there
        assert [point.step for point in arm.curve] == steps
        means = np.mean([np.interp(steps, *some) for some in kept], axis=0)  # which keeps the last score, too
        assert [point.score.mean for point in arm.curve] == pytest.approx(means.tolist(), abs=1e-6)
        assert arm.curve[-1].score == arm.score
        assert arm.arm == "seldom" or not math.isnan(arm.steps_to_baseline)
