"""Any training function under ``espalier.compare``: the same plan, statistics, records and report as recipes."""

from __future__ import annotations

import functools
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

import espalier
from espalier.errors import EspalierError
from espalier.recipes import Recipe, get_recipe
from espalier.report import write_report
from espalier.study import add_records, launch, load_study, summarise, text_table
from espalier.study.own_training import read_scores
from espalier.study.table import failure_lines
from espalier.train import RunInterrupted

Call = tuple[str, float, int]


def score_of(arm: str, lr: float, seed: int) -> float:
    """Return 3 for the arm ``high`` and 1 for others, less for rates away from 0.1, and noise of the seed."""
    return (
        (3.0 if arm == "high" else 1.0) - abs(math.log10(lr) + 1) + 0.1 * (seed * 7 % 5) + 0.01 * seed * (arm == "high")
    )


CALLS: list[Call] = []


def train(arm: str, lr: float, seed: int, folder: Path) -> float:
    CALLS.append((arm, lr, seed))
    (folder / "result.json").write_text("mine")  # no name is taken in the user's folder
    (folder / "failure.txt").write_text("mine")
    return score_of(arm, lr, seed)


@pytest.fixture(autouse=True)
def no_calls() -> None:
    CALLS.clear()


def test_scores_are_compared_as_those_of_recipes(tmp_path: Path) -> None:
    out = tmp_path / "study"
    summary = espalier.compare(train, arms=["low", "high"], lrs=[1e-2, 1e-1], seeds=3, out=out, workers=0)
    low, high = summary.arms
    assert sorted(CALLS) == sorted((arm, lr, s) for arm in ("low", "high") for lr in (1e-2, 1e-1) for s in range(3))
    assert summary.metric == "score"
    assert (low.best_lr, high.best_lr) == (1e-1, 1e-1)
    gaps = [score_of("high", 1e-1, s) - score_of("low", 1e-1, s) for s in range(3)]
    theirs = scipy.stats.ttest_1samp(gaps, 0).confidence_interval(0.95)
    assert (high.difference.t.low, high.difference.t.high) == pytest.approx((theirs.low, theirs.high))
    assert high.difference.shown
    assert "high is +2.01 over low" in text_table(summary)
    # Nothing is trained twice; new seeds, rates and arms join.
    CALLS.clear()
    assert espalier.compare(train, arms=["low", "high"], lrs=[1e-1], seeds=2, out=out, workers=0).arms[0].score.n == 3
    assert CALLS == []
    wider = espalier.compare(train, arms=["low", "new"], lrs=[1e-1], seeds=[3], out=out, workers=0)
    assert [arm.arm for arm in wider.arms] == ["low", "new", "high"]
    assert {call for call in CALLS if call[0] != "new"} == {("low", lr, 3) for lr in (1e-2, 1e-1)} | {
        ("high", lr, 3) for lr in (1e-2, 1e-1)
    }
    assert load_study(out) == wider.study


def test_curves_give_steps_to_baseline_and_the_page(tmp_path: Path) -> None:
    def curve(arm: str, lr: float, seed: int, folder: Path) -> list[tuple[int, float]]:
        return [(step, step / (100 if arm == "slow" else 50)) for step in (0, 50, 100)]

    summary = espalier.compare(curve, arms=["slow", "fast"], lrs=[1.0], seeds=2, out=tmp_path / "s", workers=0)
    assert [arm.steps_to_baseline for arm in summary.arms] == [100, 50]
    assert [point.step for point in summary.arms[0].curve] == [0, 50, 100]
    text = text_table(summary)
    assert "steps to baseline" in text
    assert "50 of 100" in text
    page = write_report([tmp_path / "s"], tmp_path / "page.html").read_text()
    assert "steps to baseline" in page
    assert "Training function" in page
    assert "epoch" not in page.partition("What was found")[2].partition("<script")[0]


def test_auto_rates_have_their_centre_from_lr_and_shares_their_limits(tmp_path: Path) -> None:
    def share(arm: str, lr: float, seed: int, folder: Path) -> float:
        return 1.0 - 0.01 * seed

    summary = espalier.compare(share, arms=["a"], seeds=2, out=tmp_path / "s", workers=0, lr=0.1, metric="val accuracy")
    assert summary.study.lrs == (1e-2, 3.2e-2, 0.1, 0.32, 1.0)
    assert summary.is_share
    assert summary.arms[0].score.high == 1.0  # an interval of shares ends there


def test_diverged_and_failed_trials_are_counted_and_tried_again(tmp_path: Path) -> None:
    broken = [True]

    def fragile(arm: str, lr: float, seed: int, folder: Path) -> Any:
        if arm == "fails" and broken:
            raise RuntimeError("too\nbad")
        return [(1, 0.5), (2, float("nan"))] if arm == "diverges" else 0.5

    options: dict[str, Any] = {"lrs": [1.0], "seeds": 3, "out": tmp_path / "s", "workers": 0}
    summary = espalier.compare(fragile, arms=["fine", "diverges", "fails"], **options)
    assert [arm.diverged for arm in summary.arms] == [0, 3, 0]
    assert [arm.failed for arm in summary.arms] == [0, 0, 3]
    assert failure_lines(summary) == ["3 trials failed, fails lr=1 seed=0 first: RuntimeError: too bad"]
    broken.clear()
    options["keep_trials"] = True
    assert not espalier.compare(fragile, arms=["fine", "diverges", "fails"], **options).failures


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
@pytest.mark.parametrize("end", [lambda: 0.5, lambda: sys.exit(1), lambda: 1 / 0])
def test_a_stopped_trial_is_no_outcome_whatever_its_training_makes_of_it(
    tmp_path: Path, number: signal.Signals, status: int, end: Callable[[], float]
) -> None:
    def stopped(arm: str, lr: float, seed: int, folder: Path) -> float:
        CALLS.append((arm, lr, seed))
        if len(CALLS) == 2:
            try:
                signal.raise_signal(number)
            except KeyboardInterrupt:
                return end()  # as loops do that "stop early"
        return 1.0

    with pytest.raises(RunInterrupted, match="1 of 4 trials") as error:
        espalier.compare(stopped, arms=["a", "b"], lrs=[1.0], seeds=2, out=tmp_path / "s", workers=0)
    assert error.value.status == status
    assert len(CALLS) == 2
    assert [trial.failure for trial in load_study(tmp_path / "s").trials()] == [None] * 4
    summary = espalier.compare(stopped, arms=["a", "b"], lrs=[1.0], seeds=2, out=tmp_path / "s", workers=0)
    assert sorted(CALLS[2:]) == [("a", 1.0, 1), ("b", 1.0, 0), ("b", 1.0, 1)]
    assert not summary.failures
    assert all(trial.finished for trial in load_study(tmp_path / "s").trials())


def test_a_training_may_change_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def moves(arm: str, lr: float, seed: int, folder: Path) -> float:
        os.chdir(folder)
        (folder / "mine").touch()
        return 1.0

    monkeypatch.chdir(tmp_path)
    espalier.compare(moves, arms=["a", "b"], lrs=[1.0], seeds=2, out="s", workers=0)
    assert len(list(tmp_path.rglob("record.json"))) == 4
    assert all(path.parent.name == "files" for path in tmp_path.rglob("mine"))


def test_a_trial_that_exits_fails_alone(tmp_path: Path) -> None:
    def exits(arm: str, lr: float, seed: int, folder: Path) -> float:
        return sys.exit("no data") if arm == "a" and not seed else 1.0

    espalier.compare(exits, arms=["a", "b"], lrs=[1.0], seeds=2, out=tmp_path / "s", workers=0)
    trials = load_study(tmp_path / "s").trials()
    assert [trial.finished for trial in trials] == [False, True, True, True]
    assert (trials[0].failure or "").startswith("SystemExit: no data")


def test_another_function_is_refused_and_a_bound_value_counts(tmp_path: Path) -> None:
    def depends(arm: str, lr: float, seed: int, folder: Path, depth: int = 1) -> float:
        return depth

    options: dict[str, Any] = {"arms": ["a"], "lrs": [1.0], "seeds": 1, "out": tmp_path / "s", "workers": 0}
    espalier.compare(functools.partial(depends, depth=2), **options)
    espalier.compare(functools.partial(depends, depth=2), **options)
    for other in (functools.partial(depends, depth=3), depends, train):
        with pytest.raises(EspalierError, match=r"holds another study: (its training|name) .*choose another folder"):
            espalier.compare(other, **options)
    with pytest.raises(EspalierError, match="metric is 'score' there and 'loss' here"):
        espalier.compare(functools.partial(depends, depth=2), **options, metric="loss")
    with pytest.raises(EspalierError, match="a function of your own there, a recipe here"):
        espalier.compare(get_recipe("digits_vit"), **{**options, "arms": ["default"]})
    unfinished = replace(load_study(tmp_path / "s"), seeds=(0, 1))
    (failed,) = launch(unfinished, workers=0)
    assert "trains this study: call espalier.compare with that function" in failed.failure


def test_records_stand_for_trials_elsewhere(tmp_path: Path) -> None:
    options: dict[str, Any] = {"arms": ["low", "high"], "lrs": [0.1], "seeds": 2, "workers": 0}
    first = espalier.compare(train, out=tmp_path / "a", **options)
    espalier.compare(train, out=tmp_path / "c", **{**options, "seeds": 1})
    add_records(load_study(tmp_path / "a").outcomes().values(), tmp_path / "c" / "records.jsonl")
    CALLS.clear()
    second = espalier.compare(train, out=tmp_path / "c", **options)
    assert CALLS == []
    assert [arm.score for arm in second.arms] == [arm.score for arm in first.arms]


SCRIPT = """
import sys
import espalier

SCALE = 2.0

def train(arm, lr, seed, folder):
    (folder / "note.txt").write_text(str(seed))
    return [(1, lr), (2, SCALE * seed + (arm == "b"))]

summary = espalier.compare(train, arms=["a", "b"], lrs=[0.1], seeds=2, out=sys.argv[1], workers=2)
print(*(arm.score.mean for arm in summary.arms))
"""


def test_a_script_without_a_guard_has_workers_and_resumes(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for _ in range(2):
        out = subprocess.run(
            [sys.executable, "mine.py", "study"], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert (out.returncode, out.stdout, out.stderr) == (0, "1.0 2.0\n", "")
    notes = sorted((tmp_path / "study").rglob("files/note.txt"))
    assert [note.read_text() for note in notes] == ["0", "1", "0", "1"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 0}, "seeds 0: give how many, from 1"),
        ({"seeds": []}, "seeds is empty"),
        ({"arms": []}, "arms is empty"),
        ({"arms": "low"}, "arms 'low': give a list of names"),
        ({"arms": {"low": {}}}, "arms .*: give a list of names"),
        ({"arms": ["a/b"]}, "arm 'a/b': choose a name that a folder can bear"),
        ({"arms": ["a:b"]}, "arm 'a:b'"),
        ({"arms": ["a", "a"]}, "'a' is named twice"),
        ({"train": lambda arm, lr: 1.0}, r"must take \(arm, lr, seed, folder\)"),
        ({"train": Recipe(name="r"), "arms": ["default"], "metric": "loss"}, "metric belongs to a training function"),
        ({"train": Recipe(name="r"), "arms": ["default"], "lr": 0.1}, "lr belongs to a training function"),
        ({"lr": -1.0, "lrs": "auto"}, "lr"),
        ({"lr": "high", "lrs": "auto"}, "lr 'high': give a positive number"),
        ({"lr": 1e308, "lrs": "auto"}, "lrs: inf is no learning rate"),
        ({"lrs": 0.1}, "lrs 0.1: give learning rates"),
        ({"lrs": iter(())}, "lrs is empty"),
        ({"lrs": [True]}, "lrs: True is no learning rate"),
        ({"seeds": 2.0}, "seeds 2.0: give how many"),
        ({"seeds": [10**18]}, "is no seed"),
        ({"seeds": [10**400]}, "is no seed"),
        ({"arms": {"low", "high"}}, "arms .*: give a list of names, the baseline first"),  # which has no first
        ({"arms": [1, 2]}, "arms: 1 is no name"),
        ({"arms": ["a\nb"]}, "choose a name that a folder can bear"),
        ({"arms": ["a\udcff"]}, "choose a name that a folder can bear"),
        ({"arms": ["a" * 240]}, "choose a name that a folder can bear"),
        ({"metric": 3}, "metric 3: give its name"),
        ({"metric": "a\0b"}, r"metric 'a\\x00b': give its name"),
        ({"workers": 1.5}, "workers 1.5: give a whole number from 0"),
    ],
)
def test_bad_arguments_are_one_line_and_leave_nothing(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    arguments = {"train": train, "arms": ["low"], "lrs": [1.0], "seeds": 1, "out": tmp_path / "s", "workers": 0}
    with pytest.raises(EspalierError, match=message) as caught:
        espalier.compare(**{**arguments, **change})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("make", [np.array, torch.tensor, list, tuple, iter], ids=lambda make: make.__name__)
def test_rates_and_seeds_in_any_container_are_the_same_plan(tmp_path: Path, make: Callable[[Any], Any]) -> None:
    summary = espalier.compare(
        train, arms=make(["low", "high"]) if make in (list, tuple, iter) else ["low", "high"],
        lrs=make([0.01, 0.1]), seeds=make([0, 2]), out=tmp_path / "s", workers=0,
    )  # fmt: skip
    assert (summary.study.lrs, summary.study.seeds, list(summary.study.arms)) == ((0.01, 0.1), (0, 2), ["low", "high"])
    assert load_study(tmp_path / "s").trials() == summary.study.trials()
    assert espalier.compare(
        train, arms=["low"], lrs=list(np.array([0.1])), seeds=np.int64(1), out=tmp_path / "t", workers=0
    ).study.seeds == (0,)


SIZE = 0.0


def sized(arm: str, lr: float, seed: int, folder: Path) -> list[tuple[int, float]]:
    score = SIZE + 3 * seed + (0.4 if arm == "high" else 0.0)
    return [(0, SIZE), (1, score)]


@pytest.mark.parametrize("size", [0.0, -12345678.0, 1e12])
def test_a_difference_counts_however_large_the_scores_are(
    tmp_path: Path, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SIZE", size)
    summary = espalier.compare(sized, arms=["low", "high"], lrs=[0.1], seeds=4, out=tmp_path / "s", workers=0)
    found = summary.difference("high", "low")
    assert found is not None
    assert (found.t.mean, found.t.low, found.t.high) == pytest.approx((0.4, 0.4, 0.4), abs=1e-3)


numbers = st.one_of(
    st.floats(), st.integers(-5, 5), st.floats(width=32).map(np.float32), st.floats(width=32).map(torch.tensor),
    st.none(), st.text(max_size=3), st.booleans(),
)  # fmt: skip
returned = st.one_of(
    numbers,
    st.lists(st.tuples(numbers, numbers), max_size=4),
    st.lists(numbers, max_size=3),
    st.dictionaries(st.text(max_size=2), numbers, max_size=2),
)


def test_a_number_of_thousands_of_digits_is_refused_in_one_line() -> None:
    with pytest.raises(EspalierError, match="train returned a number of thousands of digits"):
        read_scores(10**5000, "score")


@given(returned, st.sampled_from(["score", "accuracy"]))
def test_whatever_is_returned_is_a_curve_or_one_line(value: Any, metric: str) -> None:
    try:
        curve = read_scores(value, metric)
    except EspalierError as error:
        assert str(error).startswith("train returned ")  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017
        return
    steps = [step for step, _ in curve]
    assert steps == sorted(set(steps))
    assert all(isinstance(score, float) for _, score in curve)
    if isinstance(value, list):
        assert steps == pytest.approx([float(step) for step, _ in value])
        assert [score for _, score in curve] == pytest.approx([float(score) for _, score in value], nan_ok=True)
    else:
        assert curve[0][1] == pytest.approx(float(value), nan_ok=True)


CONVMIXER = {"model": "convmixer", "model_args": {"dim": 8, "depth": 1, "kernel_size": 3, "patch_size": 1}}


def test_an_arm_that_cannot_be_trained_is_told_before_anything_is_written(tmp_path: Path) -> None:
    recipe = get_recipe("digits_vit")
    for arms, message in (
        (["default", "covariance"], "arm 'covariance': "),
        (["default", "default-frozen"], "arm 'default-frozen': freeze 'depthwise'"),
        ({"one": {"model_args": {"depht": 1}}}, "arm 'one': unknown argument of model 'vit' 'depht'"),
        ({"one": {**CONVMIXER, "optimizer": "muon"}}, "arm 'one': optimizer 'muon': model 'convmixer' has no linear"),
        ({"one": {"batch_size": 10**6}}, "arm 'one': batch_size 1000000 is larger than the training set"),
    ):
        with pytest.raises(EspalierError, match=message) as caught:
            espalier.compare(recipe, arms=arms, lrs=[1.0], seeds=1, out=tmp_path / "s", workers=0)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "s").exists()


def test_recipes_take_the_same_path(tmp_path: Path) -> None:
    recipe = replace(
        get_recipe("digits_convmixer"), epochs=1, threads=1, data_args={"train_limit": 64, "test_limit": 32}
    )
    arms = ["default", "covariance"]
    summary = espalier.compare(recipe, arms=arms, lrs=[1e-2], seeds=1, out=tmp_path / "s", workers=0)
    assert [arm.finished for arm in summary.arms] == [1, 1]
    assert summarise(tmp_path / "s").arms[0].score == summary.arms[0].score
    assert summary.run("default", 1e-2, 0).recipe.epochs == 1
