"""``make env``: torch comes with what it needs, a gigabyte is announced, and a Python without venv gets one line."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "requirements" / "environment.py"


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("environment", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_python_without_ensurepip_gets_one_line_with_the_remedy(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ensurepip" else find(name))
    with pytest.raises(SystemExit) as caught:
        script.main(tmp_path / "venv", "1.0", "")
    message = str(caught.value)
    assert "no module ensurepip" in message
    assert f"apt-get install python3.{sys.version_info.minor}-venv, or name another Python with PYTHON=" in message
    assert "\n" not in message
    assert not (tmp_path / "venv").exists()


def test_an_environment_without_pip_gets_one_line_with_the_remedy(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    run = subprocess.run(
        [sys.executable, SCRIPT, tmp_path / "venv", "1.0"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert run.stdout == ""
    assert "has no pip: remove the folder" in run.stderr
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("there", "index", "announced", "torch_installed"),
    [
        ("", "", True, ["torch==2.13.0"]),
        ("2.12.0", "", True, ["torch==2.13.0"]),
        ("", "https://example.org/cpu", False, ["torch==2.13.0", "--index-url", "https://example.org/cpu"]),
        ("2.13.0", "", False, None),
    ],
)
def test_torch_comes_with_what_it_needs_unless_it_is_there(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    there: str, index: str, announced: bool, torch_installed: list[str] | None,
) -> None:  # fmt: skip
    commands: list[list[str]] = []
    told_before: list[bool] = []

    def run(command: list[object], **options: object) -> subprocess.CompletedProcess[str]:
        commands.append([str(part) for part in command])
        told_before.append("GB" in capsys.readouterr().out)
        return subprocess.CompletedProcess(command, 0, stdout=f"{there}\n")

    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    monkeypatch.setattr(script.subprocess, "run", run)
    script.main(tmp_path, "2.13.0", index)
    installs = [command[command.index("--quiet") + 1 :] for command in commands if "install" in command]
    assert (installs[0] == torch_installed) == (torch_installed is not None)
    assert any(told_before) == announced
    if announced:
        assert told_before.index(True) == next(i for i, command in enumerate(commands) if "torch==2.13.0" in command)
    # Everything but torch and what it needs is pinned by the lock.
    assert all("--no-deps" in install for install in installs[bool(torch_installed) :])
    lock = Path(next(command[-1] for command in commands if "-r" in command)).read_text()
    assert "\nnumpy==" in lock
    assert "\ntorch==" not in lock
    assert "\ntorchattacks==" in lock
