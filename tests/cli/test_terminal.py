"""What the terminal does to a command: few columns, Ctrl-C, variables of launchers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from espalier.cli.main import main

STOPPED = """
import os, signal
from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_classes):
        os.kill(os.getpid(), signal.SIGINT)
        super().__init__(nn.Flatten(), nn.Linear(64, num_classes))
"""


@pytest.mark.parametrize("columns", ["1", "5"])
@pytest.mark.parametrize("words", [["report", "--help"], ["train", "--help"], ["report", "--nonsense"]])
def test_help_ends_in_a_terminal_of_a_few_columns(columns: str, words: list[str]) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "espalier", *words], env={**os.environ, "COLUMNS": columns}, capture_output=True,
        text=True, check=False, timeout=60,
    )  # fmt: skip
    assert "usage: espalier" in run.stdout if "--help" in words else run.stderr.startswith("espalier: ")


def test_ctrl_c_before_anything_is_trained_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(STOPPED)
    assert main(["compare", "digits_vit", "--model", "own.py:Net", "--arms", "default", "--workers", "0"]) == 130
    assert capsys.readouterr().err == "espalier: interrupted: run the same command again to resume\n"
    assert main(["train", "digits_vit", "--model", "own.py:Net", "--threads", "1"]) == 130
    error = capsys.readouterr().err
    assert error.endswith("espalier: interrupted: the run in runs/digits_vit has no checkpoint yet; run the same "
                          "command again to start it\n")  # fmt: skip


def test_a_rank_without_a_launcher_means_nothing(tmp_path: Path) -> None:
    words = ["train", "digits_vit", "--epochs", "1", "--threads", "1", "--logger", "csv", "--out", "run"]
    run = subprocess.run(
        [sys.executable, "-m", "espalier", *words, "--data-args.train-limit", "128"], env={**os.environ, "RANK": "1"},
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert '"score"' in run.stdout
    assert "run: run\n" in run.stderr
    assert list((tmp_path / "run/logs").rglob("*.csv"))
