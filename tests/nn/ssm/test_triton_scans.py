"""The Triton kernels without a GPU: right in Triton's interpreter, which a process must be in from its start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from needs import needs_library


@pytest.mark.slow
@needs_library("triton", "triton")
def test_kernels_in_the_interpreter() -> None:
    file = Path(__file__).with_name("interpreted_triton_scans.py")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
