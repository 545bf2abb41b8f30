"""A finished run counts for the trial that it is of, wherever somebody copied it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import espalier
from espalier.cli.main import main
from espalier.errors import EspalierError
from espalier.recipes import get_recipe
from espalier.study import Study, launch, load_study, plan_study, summarise
from fabricated_runs import fabricate, fabricate_trial

RECIPE = replace(get_recipe("digits_vit"), epochs=2, warmup_epochs=0.0)


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Two arms at two rates and two seeds, all finished."""
    study = plan_study(RECIPE, ["default", "mimetic"], [1e-3, 3e-3], [0, 1], tmp_path / "s")
    launch(study, workers=0, run=fabricate_trial)
    return study


def _other_seed(there: Path) -> None:
    shutil.copytree(there.with_name("seed=0"), there, dirs_exist_ok=True)


def _other_rate(there: Path) -> None:
    shutil.copytree(there.parents[1] / "lr=0.001" / there.name, there, dirs_exist_ok=True)


def _other_arm(there: Path) -> None:
    shutil.copytree(there.parents[2] / "default" / "lr=0.003" / there.name, there, dirs_exist_ok=True)


def _other_epochs(there: Path) -> None:
    fabricate(replace(RECIPE, init="mimetic", lr=3e-3, seed=1, epochs=9), there, 0.9)


@pytest.mark.parametrize(
    ("put", "said"),
    [
        (_other_seed, "has seed 0, and the trial 1"),
        (_other_rate, r"has lr 0\.001, and the trial 0\.003"),
        (_other_arm, "has digest '[0-9a-f]{16}', and the trial '[0-9a-f]{16}'"),
        (_other_epochs, "has digest '[0-9a-f]{16}', and the trial '[0-9a-f]{16}'"),
    ],
)
def test_a_run_that_is_of_another_trial_is_refused_by_the_name_of_its_folder(
    study: Study, put: Callable[[Path], None], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trial = study.trial("mimetic", 3e-3, 1)
    shutil.rmtree(trial.path)
    put(trial.path)
    said = f"lr=0.003.seed=1: the record of mimetic lr=0.003 seed=1 {said}: delete it"
    for ask in (summarise, Study.outcomes):
        with pytest.raises(EspalierError, match=said):
            ask(load_study(study.path))
    # Before anything is trained beside it, or planned.
    wider, plan = plan_study(RECIPE, ["default"], [1e-3], [0, 1, 2], study.path), study.path / "study.json"
    before = plan.read_bytes()
    with pytest.raises(EspalierError, match=said):
        launch(wider, workers=0, run=fabricate_trial)
    with pytest.raises(EspalierError, match=said):
        espalier.compare(RECIPE, arms=["default"], lrs=[1e-3], seeds=4, out=study.path, workers=0)
    assert plan.read_bytes() == before
    assert not list(study.path.glob("trials/*/*/seed=2"))
    capsys.readouterr()
    assert main(["records", "export", str(study.path), "--to", str(study.path.with_name("r.jsonl"))]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not study.path.with_name("r.jsonl").exists()


def test_a_record_of_a_training_function_of_other_code_is_refused(tmp_path: Path) -> None:
    def first(arm: str, lr: float, seed: int, folder: Path) -> float:
        return 0.25 + seed

    def second(arm: str, lr: float, seed: int, folder: Path) -> float:
        return 0.5 + seed

    options = {"arms": ["one", "two"], "lrs": [1e-3], "seeds": 2, "workers": 0}
    for name, train in (("a", first), ("b", second)):
        train.__qualname__ = "train"
        espalier.compare(train, out=tmp_path / name, **options)
    place = Path("trials/two/lr=0.001/seed=1/record.json")
    shutil.copy(tmp_path / "a" / place, tmp_path / "b" / place)
    with pytest.raises(EspalierError, match=r"record\.json: the record of two lr=0\.001 seed=1 has digest"):
        summarise(tmp_path / "b")
