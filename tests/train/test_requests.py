"""Signals and clocks: a checkpoint within the step, a status that says resumable, the same bits after going on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import standins
from standins import BlobSource, recipe

from espalier import data, models
from espalier.cli.main import main
from espalier.errors import EspalierError
from espalier.train import RunInterrupted, load_run, loop, train
from espalier.train.requests import RESUMABLE, Requests

pytestmark = pytest.mark.usefixtures("stand_ins")

STOPS = [(signal.SIGTERM, RESUMABLE), (signal.SIGUSR1, RESUMABLE), (signal.SIGINT, 130)]


def stop_at(monkeypatch: pytest.MonkeyPatch, epoch: int, step: int, number: int) -> None:
    """Send this process a signal at one step, once."""
    source = BlobSource(signal_at=(epoch, step, number))
    monkeypatch.setattr(data, "build_source", lambda _: source)


@pytest.mark.parametrize(("number", "status"), STOPS)
def test_a_signal_loses_no_step_and_changes_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, status: int
) -> None:
    changes = {"ema_decay": 0.9, "eval_every": 3, "checkpoint_every": 2}
    whole = train(recipe(**changes), tmp_path / "whole")
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    steps = []
    for epoch, step in ((0, 0), (1, 4), (3, 1)):
        with monkeypatch.context() as patch:
            stop_at(patch, epoch, step, number)
            with pytest.raises(RunInterrupted, match=f"after step {5 * epoch + step + 1};") as caught:
                train(recipe(**changes), tmp_path / "cut")
        assert caught.value.status == status
        assert "\n" not in str(caught.value)
        steps.append(load_run(tmp_path / "cut").rows[-1]["step"])
    assert steps == [0, 0, 15]
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == handlers
    run = train(recipe(**changes), tmp_path / "cut")
    assert outcome(run.path) == outcome(whole.path)


def outcome(path: Path) -> tuple[bytes, list[dict[str, Any]]]:
    timed = ("seconds", "step_seconds")
    rows = [{key: value for key, value in row.items() if key not in timed} for row in load_run(path).rows]
    return (path / "final.safetensors").read_bytes(), rows


@pytest.mark.parametrize(("number", "status"), STOPS)
@pytest.mark.parametrize("place", ["build_run_source", "build_run_model", "create_folder", "load_checkpoint"])
def test_a_signal_before_the_first_step_is_obeyed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, number: signal.Signals, status: int
) -> None:
    """Data may take minutes to be listed and decoded: nothing is lost, and the status says that it may go on."""

    def stopped(*_: object) -> None:
        os.kill(os.getpid(), number)
        raise AssertionError("a signal is obeyed at once")

    with monkeypatch.context() as patch:
        patch.setattr(loop, place, stopped)
        with pytest.raises(RunInterrupted, match="has no checkpoint yet; run the same command again") as caught:
            train(recipe(epochs=1), tmp_path / "run")
    assert caught.value.status == status
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"run"}
    train(recipe(epochs=1), tmp_path / "run")


@pytest.mark.parametrize(("number", "status"), STOPS)
@pytest.mark.parametrize("evaluation", [1, 2, 4])
def test_a_signal_stops_an_evaluation_and_changes_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluation: int, number: signal.Signals, status: int
) -> None:
    """It may take longer than a scheduler waits, and the epoch before it is not in a checkpoint yet."""
    changes = {"ema_decay": 0.9, "epochs": 3, "checkpoint_every": 2, "eval_batch_size": 4}
    train(recipe(**changes), tmp_path / "whole")
    asked = 0

    def watched(source: BlobSource, split: str, batch_size: int) -> Iterator[Any]:
        nonlocal asked
        for index, batch in enumerate(eval_batches(source, split, batch_size)):
            asked += split == "test" and index == 1  # the first one is looked at when the source is made
            if (asked, split, index) == (evaluation, "test", 2):
                os.kill(os.getpid(), number)
            assert (asked, index) < (evaluation, 3), "a signal is obeyed after the batch"
            yield batch

    eval_batches = BlobSource.eval_batches
    with monkeypatch.context() as patch:
        patch.setattr(BlobSource, "eval_batches", watched)
        step = 5 * (evaluation - 1)
        with pytest.raises(RunInterrupted, match=f"after step {step};") as caught:
            train(recipe(**changes), tmp_path / "cut")
    assert caught.value.status == status
    assert len(load_run(tmp_path / "cut").rows) == evaluation - 1
    train(recipe(**changes), tmp_path / "cut")
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_the_command_exits_resumable_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "digits_vit", "--epochs", "2", "--batch-size", "8", "--out", str(tmp_path / "run"), "--quiet"]
    arguments += ["--model", "tiny", "--crop-padding", "0", "--threads", "1"]
    monkeypatch.setattr(models, "build_model", lambda name, **_: standins.TinyNet(4))
    with monkeypatch.context() as patch:
        stop_at(patch, 1, 2, signal.SIGTERM)
        assert main(arguments) == RESUMABLE == 75
    assert "stopped by SIGTERM: a checkpoint was written after step 8" in capsys.readouterr().err
    assert main(arguments) == 0


def test_a_second_interrupt_is_obeyed_at_once() -> None:
    with Requests() as requests, requests.noted():
        os.kill(os.getpid(), signal.SIGINT)
        assert requests.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_signals_that_somebody_else_handles_are_theirs() -> None:
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with Requests() as requests:
            os.kill(os.getpid(), signal.SIGTERM)
            assert requests.signal is None
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]


def test_checkpoints_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []
    save = loop.save_checkpoint
    monkeypatch.setattr(loop, "save_checkpoint", lambda *args: (saved.append(args[4].step), save(*args)))
    run = train(recipe(checkpoint_every=4), tmp_path / "often", checkpoint_every_minutes=1e-9)
    assert saved == [*range(1, 21), 20]
    rare = train(recipe(checkpoint_every=4), tmp_path / "rare", checkpoint_every_minutes=60)
    assert saved[21:] == [20]
    assert (run.path / "final.safetensors").read_bytes() == (rare.path / "final.safetensors").read_bytes()
    with pytest.raises(EspalierError, match="checkpoint_every_minutes 0 must be positive"):
        train(recipe(), tmp_path / "never", checkpoint_every_minutes=0)


def test_a_second_process_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = "import sys; from pathlib import Path; from espalier.files import locked\n"
    held += "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", held, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdin is not None
    assert other.stdout.readline() == "held\n"
    try:
        with pytest.raises(EspalierError, match=r"run is in use by another process"):
            train(recipe(), tmp_path / "run")
    finally:
        other.kill()
        other.wait()
        other.stdin.close()
        other.stdout.close()
    # The kill let go of the lock, and a finished run leaves no lock file.
    train(recipe(epochs=1), tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
