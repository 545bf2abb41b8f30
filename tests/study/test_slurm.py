"""Slurm for real: a cluster of one node runs studies; requeued, cancelled and orphaned jobs lose nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import slurm_cluster
import trial_runners

from espalier.cli.main import main as run_command
from espalier.errors import EspalierError
from espalier.recipes import Recipe
from espalier.study import Study, launch, load_study, plan_study, slurm

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(slurm_cluster.missing()), reason=slurm_cluster.missing() or "Slurm is here"),
]
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    with slurm_cluster.one_node_cluster() as environment:
        yield environment


@pytest.fixture(autouse=True)
def surroundings(cluster: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, cluster[name])
    monkeypatch.setenv("ESPALIER_TEST_LOG", str(tmp_path / "log.txt"))
    monkeypatch.setattr(slurm, "_POLL_SECONDS", 0.5)


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return plan_study(Recipe(name="r", epochs=2), ["default", "mimetic"], [1e-3], [0, 1], tmp_path / "study")


def jobs(state: str = "all") -> list[str]:
    command = ["squeue", "--noheader", "--format=%i", *([f"--states={state}"] if state != "all" else [])]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def steps(study: Study) -> list[list[int]]:
    files = [trial.path.parent / f"{trial.path.name}.steps" for trial in study.trials()]
    return [list(map(int, file.read_text().split())) if file.exists() else [] for file in files]


def wait(ready: Callable[[], object], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, f"still waiting; jobs: {jobs()}"
        time.sleep(0.2)


def start_launcher(study: Study) -> subprocess.Popen[str]:
    program = (
        "import sys; from espalier.study import launch, load_study, slurm; import trial_runners; "
        "slurm._POLL_SECONDS = 0.5; "
        "launch(load_study(sys.argv[1]), workers=2, cluster='slurm', run=trial_runners.counted)"
    )
    folders = os.pathsep.join((str(HERE), str(HERE.parent), *filter(None, sys.path)))
    return subprocess.Popen(
        [sys.executable, "-c", program, str(study.path)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "PYTHONPATH": folders},
    )  # fmt: skip


def test_requeued_cancelled_and_orphaned_jobs_lose_nothing(study: Study) -> None:
    launcher = start_launcher(study)
    wait(lambda: len(jobs("RUNNING")) == 2 and sum(len(done) > 2 for done in steps(study)) == 2)
    first, second = sorted(jobs("RUNNING"))
    launcher.kill()
    said, _ = launcher.communicate()
    assert said == "", "no warning at any look at the queue"
    assert set(jobs()) == {first, second}, "jobs do not need their launcher"
    subprocess.run(["scancel", second], check=True)
    subprocess.run(["scontrol", "requeue", first], check=True)
    wait(lambda: jobs() == [first] and not jobs("RUNNING"))
    assert not any(trial.finished for trial in study.trials()), "both were stopped in mid-trial"
    again = start_launcher(study)
    wait(lambda: len(jobs()) == 2)
    assert first in jobs(), "the orphan is taken back and one job is added"
    said, _ = again.communicate(timeout=400)
    assert (again.returncode, said) == (0, "")
    assert all(trial.finished for trial in study.trials())
    assert steps(study) == [list(range(30))] * 4, "every step once"
    assert jobs() == []


def test_an_interrupted_launcher_leaves_no_job(study: Study) -> None:
    launcher = start_launcher(study)
    wait(lambda: sum(map(bool, steps(study))) == 2)
    launcher.send_signal(signal.SIGINT)
    said, _ = launcher.communicate(timeout=200)
    assert "run the same command again to resume" in said
    assert jobs() == []
    assert launch(study, workers=0, run=trial_runners.counted) == ()
    assert steps(study) == [list(range(30))] * 4


def test_a_study_may_be_called_what_slurm_takes_for_symbols(tmp_path: Path) -> None:
    study = plan_study(Recipe(name="r", epochs=2), ["default"], [1e-3], [0], tmp_path / "50%accuracy, 100%j %%")
    assert launch(study, workers=1, cluster="slurm", run=trial_runners.quick) == ()
    assert [trial.finished for trial in study.trials()] == [True]
    assert len(list((study.path / "logs").glob("slurm-*.log"))) == 1


def test_a_job_that_slurm_refuses_is_one_line(study: Study) -> None:
    with pytest.raises(EspalierError, match=r"Slurm refuses the job \(.*partition.*--partition=moon") as caught:
        launch(study, cluster="slurm", parameters={"partition": "moon"}, run=trial_runners.counted)
    assert "\n" not in str(caught.value)
    assert jobs() == []


def test_the_command_line_trains_on_slurm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "compared"
    flags = ["--arms", "default", "--lrs", "1e-3", "--seeds", "1", "--workers", "1", "--epochs", "1", "--out", str(out)]
    shape = ["--data-args.train-limit", "64", "--data-args.test-limit", "64", "--batch-size", "32", "--threads", "1"]
    chosen = ["--cluster", "slurm", "--partition", "short", "--time", "30", "--account", "nobody"]
    run_command(["compare", "digits_vit", *flags, *shape, *chosen])
    assert [trial.finished for trial in load_study(out).trials()] == [True]
    assert "report.html" in capsys.readouterr().out
    run_command(["compare", "digits_vit", *flags, *shape])
    assert run_command(["compare", "digits_vit", *flags, *shape, "--partition", "short"]) == 2
