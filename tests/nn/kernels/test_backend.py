"""The choice of what runs the hot loops: automatic, overridden, and never silently worse."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from espalier.errors import EspalierError
from espalier.nn import backend, use_backend

PROBE = """
import warnings
from espalier.nn import backend
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    backend(); print(backend().name, "|", backend().reason, "|", len(seen))
"""


def probe(**environment: str) -> list[str]:
    run = subprocess.run(
        [sys.executable, "-c", PROBE], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return [part.strip() for part in run.stdout.split("|")]


def test_choosing_torch_gives_no_warning() -> None:
    assert probe(ESPALIER_BACKEND="torch") == ["torch", "asked for by ESPALIER_BACKEND", "0"]
    with use_backend("torch") as chosen:
        assert chosen.name == backend().name == "torch"


def test_demanding_what_cannot_run_is_refused() -> None:
    with pytest.raises(EspalierError, match="cannot run on cpu"), use_backend("mamba_ssm"):
        pass
    with pytest.raises(EspalierError, match="unknown backend 'tritn'"), use_backend("tritn"):
        pass
