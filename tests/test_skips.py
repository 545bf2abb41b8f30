"""A fresh clone's run ends with what it skipped and how to get it, and then with the counts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("workers", [(), ("-n", "1")])
def test_the_last_lines_say_what_was_skipped(workers: tuple[str, ...]) -> None:
    own = ("ESPALIER_DATA", "PYTEST")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "real_data", *workers]
    run = subprocess.run(
        [*command, str(Path(__file__).parent / "data" / "test_images.py")],
        env=environment, capture_output=True, text=True, check=False, timeout=200, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    *_, title, first, second, counts = [line for line in run.stdout.splitlines() if line.strip()]
    assert "not run here, and how to run it" in title
    assert first.startswith("1 test: no data set cifar10: put its files into a folder cifar10, and set ESPALIER_DATA")
    assert second.startswith("1 test: no data set fashion-mnist: ")
    assert re.search(r"\b2 skipped\b", counts)
