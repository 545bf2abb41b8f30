"""What a comparison refuses leaves no plan behind, and does not extend the one that is there."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import espalier
from espalier.cli.main import main
from espalier.errors import EspalierError
from espalier.recipes import get_recipe
from espalier.study import launch, plan_study

WORDS = ["compare", "digits_vit", "--arms", "default", "--epochs", "1", "--lrs", "1e-3"]


def _all(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--workers", "-1"], "workers -1: give a whole number from 0"),
        (["--partition", "x"], "partition: options of Slurm's jobs: add --cluster slurm"),
        (["--cluster", "slurm"], "cluster 'slurm' cannot be used here (no sbatch): choose 'local'"),
    ],
)
def test_a_refused_command_writes_no_plan_and_extends_none(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    plan_study(replace(get_recipe("digits_vit"), epochs=1), ["default"], [1e-3], [0], tmp_path / "there")
    before = _all(tmp_path)
    for out in ("new", "there"):
        assert main([*WORDS, "--seeds", "20", "--out", str(tmp_path / out), *words]) == 2
        assert capsys.readouterr().err == f"espalier: {said}\n"
    assert _all(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "parameters", "said"),
    [
        ("s", {"job-name": "mine"}, "job-name mine: a study finds its jobs by a name of its own: leave it out"),
        ("s\\1", {}, "Slurm misreads a path with a backslash: choose another folder"),
    ],
)
def test_jobs_that_slurm_would_lose_are_refused(
    tmp_path: Path, name: str, parameters: dict[str, str], said: str
) -> None:
    study = plan_study(get_recipe("digits_vit"), ["default"], [1e-3], [0], tmp_path / name)
    before = _all(tmp_path)
    with pytest.raises(EspalierError, match=said):
        launch(study, cluster="slurm", parameters=parameters)
    assert _all(tmp_path) == before


def test_a_refused_demo_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--smallest", "--workers", "-1", "--out", str(tmp_path / "demo")]) == 2
    assert capsys.readouterr().err == "espalier: workers -1: give a whole number from 0\n"
    assert not list(tmp_path.iterdir())


def test_a_function_that_cannot_be_sent_leaves_no_plan(tmp_path: Path) -> None:
    lock = threading.Lock()

    def train(arm: str, lr: float, seed: int, folder: Path) -> float:
        with lock:
            return 0.5

    options: dict[str, Any] = {"arms": ["a", "b"], "lrs": [1e-3], "out": tmp_path / "s"}
    with pytest.raises(EspalierError, match="train cannot be sent to workers"):
        espalier.compare(train, workers=2, **options)
    assert not list(tmp_path.iterdir())
    assert espalier.compare(train, workers=0, seeds=1, **options).study.path == tmp_path / "s"
