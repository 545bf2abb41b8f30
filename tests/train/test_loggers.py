"""Rows reach the loggers once each, whether or not the run was stopped in between; a missing library is one line."""

from __future__ import annotations

import csv
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from standins import BlobSource, recipe

from espalier import data
from espalier.errors import EspalierError
from espalier.train import RunInterrupted, train
from needs import needs_library

pytestmark = pytest.mark.usefixtures("stand_ins")


def run_with_a_stop(out: Path, kind: str) -> list[dict[str, float]]:
    """Train with an interruption in the third epoch, go on, and return the rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "build_source", lambda _: BlobSource(interrupt_at=(2, 1)))
        with pytest.raises(RunInterrupted):
            train(recipe(logger=kind), out, progress=False)
    return train(recipe(logger=kind), out, progress=False).rows


def test_csv_has_every_row_once(tmp_path: Path) -> None:
    rows = run_with_a_stop(tmp_path / "run", "csv")
    with (tmp_path / "run" / "logs" / "csv" / "metrics.csv").open() as file:
        logged = list(csv.DictReader(file))
    assert [int(row["step"]) for row in logged] == [row["step"] for row in rows]
    for name in ("test/accuracy", "test/loss", "train_loss", "epoch"):
        assert [row[name] for row in logged] == ["" if row[name] is None else str(row[name]) for row in rows]


@needs_library("tensorboard", "tensorboard")
def test_tensorboard_has_every_row_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = run_with_a_stop(tmp_path / "run", "tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "logs" / "tensorboard")).Reload()
    found = [(event.step, event.value) for event in events.Scalars("test/accuracy")]
    assert found == [(row["step"], pytest.approx(row["test/accuracy"])) for row in rows]


@needs_library("wandb", "wandb")
@pytest.mark.filterwarnings("default")
def test_wandb_goes_on_with_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_with_a_stop(tmp_path / "run", "wandb")
    folders = list((tmp_path / "run" / "logs" / "wandb").glob("offline-run-*"))
    assert folders
    assert len({folder.name.rpartition("-")[2] for folder in folders}) == 1


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_a_missing_library_is_one_line_and_leaves_nothing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(EspalierError, match=rf"{kind} is needed here .*\[loggers\]") as caught:
        train(recipe(logger=kind), tmp_path / "run", progress=False)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_an_unknown_logger_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EspalierError, match="field 'logger' is 'tensorbord': it must be one of"):
        train(replace(recipe(), logger="tensorbord"), tmp_path / "run")  # type: ignore[arg-type]
