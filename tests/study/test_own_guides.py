"""The guides to own models, data and training loops run as they stand on their pages: files, commands and all."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from espalier.cli.main import main
from espalier.study import load_study
from espalier.train import load_run

GUIDES = Path(__file__).parents[2] / "docs" / "guides"


def follow(page: str, folder: Path) -> list[str]:
    """Write a page's files and run its commands in ``folder``; return the commands."""
    commands = []
    blocks = re.findall(r"```(?:python title=\"(.+?)\")?\n(.*?)```", (GUIDES / page).read_text(), re.DOTALL)
    for file, text in blocks:
        if file:
            (folder / file).write_text(text)
            continue
        for line in text.splitlines():
            program, *arguments = shlex.split(line)
            if program == "python":
                run = subprocess.run(
                    [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False
                )
                assert run.returncode == 0, run.stderr
                print(run.stdout)
            else:
                assert program == "espalier"
                assert main(arguments) == 0, line
            commands.append(line)
    return commands


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))


def test_own_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(follow("your-own-model.md", tmp_path)) == 4
    run = load_run(tmp_path / "runs/small")
    assert run.recipe.model_args == {}
    model = run.model()
    assert type(model).__name__ == "MixerNet"
    start = run.model("start").depthwise.weight
    assert float(start.detach().std()) == pytest.approx(0.1, rel=0.2)
    assert load_run(tmp_path / "runs/mine").model().head.in_features == 48
    assert list(load_study(tmp_path / "runs/compare-digits_vit").arms) == ["default", "covariance", "small_filters"]
    assert "small_filters against default" in capsys.readouterr().out
    assert (tmp_path / "runs/compare-digits_vit/report.html").stat().st_size > 10_000
    assert json.loads((tmp_path / "runs/mixer/structure.json").read_text())["layers"]
    # The code is part of the run.
    (tmp_path / "nets.py").write_text((tmp_path / "nets.py").read_text() + "\n")
    assert main(["audit", "runs/small"]) == 2
    assert "nets.py is not the code that this was planned or trained with" in capsys.readouterr().err


def test_own_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(follow("your-own-data.md", tmp_path)) == 3
    assert load_run(tmp_path / "runs/waves").result["steps"] == 2 * (256 // 64)
    loaders = load_run(tmp_path / "runs/loaders")
    assert loaders.result["metric"] == "val/accuracy"
    assert "noise/accuracy" in loaders.rows[-1]
    assert loaders.result["steps"] == 2 * 4
    assert json.loads((tmp_path / "runs/waves/model.json").read_text())["args"]["num_classes"] == 2
    assert "mimetic against default" in capsys.readouterr().out


def test_own_training_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(follow("your-own-training-loop.md", tmp_path)) == 2
    out = capsys.readouterr().out
    assert "steps to baseline" in out
    assert "3 paired seeds" in out
    study = load_study(tmp_path / "study")
    assert len(study.outcomes()) == 18
    assert len(list((tmp_path / "study").rglob("net.pt"))) == 18
    assert (tmp_path / "report.html").stat().st_size > 10_000
