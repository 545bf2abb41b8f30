from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trial_runners
from filelock import FileLock

from espalier.errors import EspalierError
from espalier.recipes import Recipe, get_recipe
from espalier.study import Study, Trial, launch, plan_study, slurm
from espalier.study.worker import claim, drain
from espalier.train import RunInterrupted, loop
from fabricated_runs import fabricate_trial

RECIPE = Recipe(name="r", epochs=2)


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "log.txt"
    file.touch()
    monkeypatch.setenv("ESPALIER_TEST_LOG", str(file))
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
    assert launch(study, workers=2, run=trial_runners.together) == ()
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
    with pytest.raises(EspalierError, match=r"2 of 2 workers died and 4 trials are unfinished: see .*\.log") as caught:
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
from espalier.study.worker import claim
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
    with FileLock(files[0], blocking=False):
        pass


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("number", "words", "status"),
    [
        (signal.SIGINT, "interrupted", 130),
        (signal.SIGTERM, "stopped by SIGTERM", 75),
        (signal.SIGUSR1, "stopped by SIGUSR1", 75),
    ],
)
def test_interrupted_workers_stop_and_the_message_says_how_to_go_on(
    study: Study, log: Path, number: signal.Signals, words: str, status: int, workers: int
) -> None:
    script = (
        "import sys, trial_runners; from espalier.study import launch, load_study\n"
        f"try: launch(load_study(sys.argv[1]), workers={workers}, run=trial_runners.slow)\n"
        "except KeyboardInterrupt as stop: print(stop.status, stop)\n"
    )
    launcher = subprocess.Popen(
        [sys.executable, "-c", script, str(study.path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell that runs the tests in the background makes its children ignore Ctrl-C.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    wait_for(lambda: len(log.read_text().splitlines()) >= max(1, workers))
    os.killpg(launcher.pid, number)  # what Ctrl-C on a terminal does; schedulers do so, too
    out, error = launcher.communicate(timeout=60)
    assert "Traceback" not in error
    assert out.splitlines()[-1] == (
        f"{status} {words}: 0 of 6 trials in {study.path} are done; run the same command again to resume"
    )
    for line in log.read_text().splitlines():
        with pytest.raises(ProcessLookupError):
            os.kill(int(line.split()[0]), 0)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_trial_in_this_process_saves_before_the_study_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, status: int
) -> None:
    shape = {"patch_size": 4, "embed_dim": 12, "depth": 1, "num_heads": 3}
    sizes = {"train_limit": 64, "test_limit": 40}
    recipe = replace(get_recipe("digits_vit"), data_args=sizes, model_args=shape, batch_size=16, epochs=2, threads=1)
    small = plan_study(recipe, ["default"], [1e-3], [0], tmp_path / "small")
    step = loop._step

    def signalled(*arguments: Any) -> Any:
        os.kill(os.getpid(), number)
        return step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_step", signalled)
        with pytest.raises(RunInterrupted, match=r"0 of 1 trials .* run the same command again") as caught:
            launch(small, workers=0)
    assert caught.value.status == status
    (trial,) = small.trials()
    assert (trial.path / "checkpoint").is_dir()
    assert launch(small, workers=0) == ()


def test_workers_end_with_a_killed_launcher(study: Study, log: Path) -> None:
    script = "import sys, trial_runners; from espalier.study import launch, load_study\n"
    script += "launch(load_study(sys.argv[1]), workers=2, run=trial_runners.slow)\n"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", script, str(study.path)], env=environment) as launcher:
        wait_for(lambda: len(log.read_text().splitlines()) >= 2)
        launcher.kill()
    workers = [int(line.split()[0]) for line in log.read_text().splitlines()]
    wait_for(lambda: not any(map(is_alive, workers)))
    assert launch(study, workers=0, run=trial_runners.quick) == ()  # every claim is free


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    # A process whose parent has gone stays as a zombie until someone asks for its status.
    status = Path(f"/proc/{process}/stat")
    return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")


def test_functions_of_a_script_reach_the_workers(study: Study, tmp_path: Path) -> None:
    # Without a guard: workers must not run the script again. A lambda cannot be imported by any name.
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom espalier.study import launch, load_study\nfrom fabricated_runs import fabricate\n"
        "offset = 0.5\n"
        "run = lambda trial: fabricate(trial.recipe, trial.path, offset)\n"
        "print(launch(load_study(sys.argv[1]), workers=2, run=run))\n"
    )
    command = [sys.executable, str(script), str(study.path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    assert out.stdout == "()\n"
    assert {trial.outcome("s").score for trial in study.trials()} == {0.5}


def test_torchrun_and_what_cannot_be_sent_are_refused(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = threading.Lock()
    with pytest.raises(EspalierError, match="train cannot be sent to workers") as caught:
        launch(study, workers=2, run=lambda trial: lock.acquire())
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(EspalierError, match="run it without torchrun"):
        launch(study, run=trial_runners.quick)


def test_interrupt_inline(study: Study) -> None:
    def run(trial: Trial) -> None:
        if trial.seed == 1:
            raise KeyboardInterrupt
        fabricate_trial(trial)

    with pytest.raises(RunInterrupted, match=r"2 of 6 trials .* again to resume"):
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


def test_bad_arguments(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EspalierError, match="cluster 'moon'"):
        launch(study, cluster="moon")
    with pytest.raises(EspalierError, match="workers -1"):
        launch(study, workers=-1)
    with pytest.raises(EspalierError, match=r"partition, time: .* --cluster slurm"):
        launch(study, parameters={"partition": "gpu", "time": 60})
    monkeypatch.setenv("PATH", "")
    with pytest.raises(EspalierError, match="cluster 'slurm' cannot be used here"):
        launch(study, cluster="slurm", run=trial_runners.quick)


def test_jobs_of_a_folder_with_a_comma_are_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Stand-ins for Slurm's commands: one takes the job, the other says that it is gone, and both note what they got.
    for command in ("sbatch", "squeue"):
        (tmp_path / command).write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
        (tmp_path / command).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    study = plan_study(get_recipe("digits_vit"), ["default"], [1e-3], [0], tmp_path / "one,two")
    with pytest.raises(EspalierError, match=r"1 trials .* unfinished"):
        launch(study, workers=1, cluster="slurm", progress=False)
    asked = [line for line in (tmp_path / "asked").read_text().split() if "name=" in line]
    assert len(asked) == 3
    assert len({name.partition("name=")[2] for name in asked}) == 1
    assert "," not in asked[0]


@pytest.mark.parametrize(
    ("left", "up"),
    [
        *(("1:30", True), ("3:00", True), ("3:01", False), ("1:00:00", False), ("1-00:00:10", False)),
        *(("UNLIMITED", False), ("INVALID", False), ("", False)),
    ],
)
def test_a_job_goes_back_into_the_queue_only_where_the_clock_stopped_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str, up: bool
) -> None:
    # A stand-in for Slurm's command that says how much time a running job has left.
    squeue = tmp_path / "squeue"
    squeue.write_text(f"#!/bin/sh\necho '{left}'\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert slurm._time_is_up() is up
