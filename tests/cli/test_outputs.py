"""No command writes over what it reads."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from espalier.cli.main import main
from espalier.cli.outputs import spare_inputs
from espalier.recipes import get_recipe
from espalier.study import launch, plan_study
from fabricated_runs import fabricate_trial

TINY = ["--epochs", "1", "--data-args.train-limit", "128", "--data-args.test-limit", "100", "--threads", "1"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    assert main(["train", "digits_vit", *TINY, "--quiet", "--out", str(folder / "run")]) == 0
    assert main(["fit", str(folder / "run"), "--out", str(folder / "fit.json")]) == 0
    study = plan_study(get_recipe("digits_vit"), ["default"], [1e-3], [0], folder / "study")
    launch(study, workers=0, run=fabricate_trial)
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "made")
    shutil.copy(made / "run/final.safetensors", tmp_path / "made/net.safetensors")
    os.symlink(tmp_path / "made/run", tmp_path / "made/link")
    monkeypatch.chdir(tmp_path / "made")
    return tmp_path / "made"


@pytest.mark.parametrize(
    "words",
    [
        "fit net.safetensors --heads 3 --out net.safetensors",
        "fit net.safetensors --heads 3 --out ./run/../net.safetensors",
        "audit net.safetensors --heads 3 --picture net.safetensors",
        "structure espalier:vit --like fit.json --out fit.json",
        "convert net.safetensors --out net.safetensors",
        "report run --out run/final.safetensors",
        "report link --out run/final.safetensors",
        "report run --out link/page.html",
        "report study --out study/study.json",
        "report study --out study/trials/default/lr=0.001/seed=0/result.json",
        "export run --to safetensors --out run/final.safetensors",
        "statistics run --out run/recipe.json",
        "certify run --out run/manifest.json",
        "attack run --out run/new.json",
        "records export study --to study/trials/default/lr=0.001/seed=0/records.jsonl",
        "records export study --to study/trials/default/lr=0.001/seed=0/metrics.jsonl",
        "records export study --to study/study.json",
    ],
)
def test_an_output_over_an_input_is_refused(words: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert "is read here" in error
    assert error.count("\n") == 1
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "words",
    [
        "report run --out page.html",
        "report study --out study/page.html",
        "fit run --out fit.json",
        "records export study --to study/records.jsonl",
        "records merge r.jsonl --to r.jsonl",
    ],
)
def test_an_output_beside_them_is_written_again_and_again(words: str, place: Path) -> None:
    assert main(["records", "export", "study", "--to", "r.jsonl"]) == 0
    assert main(words.split()) == main(words.split()) == 0


def test_words_that_are_no_paths_guard_nothing() -> None:
    spare_inputs({"arms": ("default", "mimetic"), "out": Path("mimetic")})
