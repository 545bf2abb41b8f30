from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def killed_runs(*arguments: object) -> str:
    """Run the script of killed runs on one thread (a forked child cannot use its parent's pool)."""
    result = subprocess.run(
        [sys.executable, str(HERE / "killed_runs.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_killed_in_mid_epoch_and_resumed_equals_unbroken(tmp_path: Path) -> None:
    killed_runs("mid_epoch", tmp_path)


@pytest.mark.slow
def test_killed_at_any_write_and_resumed_equals_unbroken(tmp_path: Path) -> None:
    writes = int(killed_runs("every_write", tmp_path).split()[-1])
    assert writes > 30
