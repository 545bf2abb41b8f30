from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import trial_runners

from espalier.errors import EspalierError
from espalier.recipes import Recipe
from espalier.study import Study, launch, plan_study
from espalier.study.launcher import claim, drain
from espalier.train import RunInterrupted
from fabricated_runs import fabricate_usual

RECIPE = Recipe(name="r", epochs=2)


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "log.txt"
    file.touch()
    monkeypatch.setenv("ESPALIER_TEST_LOG", str(file))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(str(Path(__file__).parents[up]) for up in (0, 1)))
    return file


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return plan_study(RECIPE, ["default", "mimetic"], [1e-3], [0, 1, 2], tmp_path / "study")


def test_inline_runs_every_trial_once_and_never_again(study: Study, log: Path) -> None:
    assert launch(study, workers=0, run=trial_runners.quick) == ()
    assert all(trial.finished for trial in study.trials())
    lines = log.read_text().splitlines()
    assert len(lines) == 6
    assert {line.split()[0] for line in lines} == {str(os.getpid())}
    launch(study, workers=4, run=trial_runners.quick)
    assert log.read_text().splitlines() == lines


def test_workers_share_the_list_and_the_threads(study: Study, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    count = [sys.executable, "-c", "import torch; print(torch.get_num_threads())"]
    threads = int(subprocess.run(count, capture_output=True, text=True, check=True).stdout)
    assert launch(study, workers=2, run=trial_runners.quick) == ()
    lines = [line.split() for line in log.read_text().splitlines()]
    assert len(lines) == len({tuple(line[1:4]) for line in lines}) == 6  # every trial once
    assert len({line[0] for line in lines} - {str(os.getpid())}) == 2  # by two other processes
    assert {line[4] for line in lines} == {str(max(1, threads // 2))}
    assert all(trial.finished for trial in study.trials())


def test_a_failed_trial_is_recorded_and_tried_again_by_the_next_launch(study: Study, log: Path) -> None:
    failed = launch(study, workers=1, run=trial_runners.fail_on_seed_one)
    assert [(trial.arm, trial.seed) for trial in failed] == [("default", 1), ("mimetic", 1)]
    assert failed[0].failure == "batch_size 9 is too large\n"  # bad input needs no traceback
    assert failed[1].failure.startswith("RuntimeError: two lines\n\nTraceback")
    assert "trial_runners.py" in failed[1].failure
    assert len(log.read_text().splitlines()) == 6  # the study went on
    drain(study, trial_runners.quick)
    assert len(log.read_text().splitlines()) == 6  # another worker leaves failures alone
    assert launch(study, workers=1, run=trial_runners.quick) == ()
    assert len(log.read_text().splitlines()) == 8
    assert not list(study.path.rglob("failure.txt"))


def test_a_killed_worker_lets_go_of_its_trial_and_is_reported(study: Study, log: Path) -> None:
    with pytest.raises(EspalierError, match=r"2 of 2 workers died and 4 trials are unfinished: see .*\.err") as caught:
        launch(study, workers=2, run=trial_runners.die_on_seed_one)
    assert "\n" not in str(caught.value)
    begun = len(log.read_text().splitlines())
    assert launch(study, workers=0, run=trial_runners.quick) == ()
    assert all(trial.finished for trial in study.trials())
    # Trials that have killed nobody come first.
    assert [line.split()[3] for line in log.read_text().splitlines()[begun:]] == ["2", "2", "1", "1"]


def test_a_claimed_trial_is_left_to_its_holder(study: Study, log: Path) -> None:
    taken = study.trials()[2]
    holder = subprocess.Popen(
        [sys.executable, "-c", CLAIM, str(study.path), str(study.trials().index(taken))],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "True\n"
    with pytest.raises(EspalierError, match=r"1 trials .* unfinished, the first is default lr=0.001 seed=1: another"):
        launch(study, workers=0, run=trial_runners.quick)
    assert not taken.finished
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    assert launch(study, workers=0, run=trial_runners.quick) == ()
    assert taken.finished


CLAIM = """
import sys, time
from espalier.study import load_study
from espalier.study.launcher import claim
study = load_study(sys.argv[1])
with claim(study, study.trials()[int(sys.argv[2])]) as mine:
    print(mine, flush=True)
    time.sleep(60)
"""


def test_claims_do_not_touch_the_trial_folder(study: Study) -> None:
    trial = study.trials()[0]
    with claim(study, trial) as mine:
        assert mine
        assert not trial.path.exists()
        with claim(study, trial) as again:
            assert not again
    files = list((study.path / ".claims").iterdir())
    assert len(files) == 1
    with files[0].open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_interrupted_workers_stop_and_the_message_says_how_to_go_on(study: Study, log: Path) -> None:
    script = (
        "import sys, trial_runners; from espalier.study import launch, load_study\n"
        "try: launch(load_study(sys.argv[1]), workers=2, run=trial_runners.slow)\n"
        "except KeyboardInterrupt as stop: print(stop)\n"
    )
    launcher = subprocess.Popen(
        [sys.executable, "-c", script, str(study.path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell that runs the tests in the background makes its children ignore Ctrl-C.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 180
    while len(log.read_text().splitlines()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(launcher.pid, signal.SIGINT)  # what Ctrl-C on a terminal does
    out, error = launcher.communicate(timeout=60)
    assert "Traceback" not in error
    assert out.splitlines()[-1] == (
        f"interrupted: 0 of 6 trials in {study.path} are done; the same command goes on with the rest"
    )
    for line in log.read_text().splitlines():
        with pytest.raises(ProcessLookupError):
            os.kill(int(line.split()[0]), 0)


def test_interrupt_inline(study: Study) -> None:
    def run(recipe: Recipe, path: Path) -> None:
        if recipe.seed == 1:
            raise KeyboardInterrupt
        fabricate_usual(recipe, path)

    with pytest.raises(RunInterrupted, match=r"2 of 6 trials .* goes on with the rest"):
        launch(study, workers=0, run=run)


def test_progress_is_one_line(study: Study, log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launch(study, workers=0, run=trial_runners.fail_on_seed_one, progress=True)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "4/6 trials, 1 failed, about" not in error.split("\r")[-1]
    assert error.split("\r")[-1].startswith("6/6 trials, 2 failed")
    assert any(" left" in part for part in error.split("\r"))
    launch(study, workers=0, run=trial_runners.quick)
    assert capsys.readouterr().err == ""


def test_bad_arguments(study: Study) -> None:
    with pytest.raises(EspalierError, match="cluster 'moon'"):
        launch(study, cluster="moon")
    with pytest.raises(EspalierError, match="workers -1"):
        launch(study, workers=-1)
    with pytest.raises(EspalierError, match="cluster 'slurm' cannot be used here"):
        launch(study, cluster="slurm", run=trial_runners.quick)
