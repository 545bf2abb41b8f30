"""The choice of what runs the hot loops: automatic, overridden, and never silently worse."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from espalier.errors import EspalierError
from espalier.nn import backend, use_backend
from needs import needs_library

STAND_IN = """
import sys, warnings
from types import ModuleType
sys.modules["mamba_ssm"] = None  # not to be imported
for name in ("triton", "espalier.nn.kernels.triton_scans"):
    sys.modules[name] = ModuleType(name) if {found} else None
if {found}:
    sys.modules["triton"].__version__ = "3"
from espalier.nn import backend
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    print(backend("cuda"), backend("cuda").name, len(seen), sep=" | ")
"""

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
    with (
        pytest.raises(EspalierError, match=r"'mamba_ssm' cannot run on cuda here .*pip install"),
        use_backend("mamba_ssm"),
    ):
        pass
    with pytest.raises(EspalierError, match="unknown backend 'tritn'"), use_backend("tritn"):
        pass


@pytest.mark.parametrize("found", [True, False])
def test_cuda_runs_in_triton_where_mamba_ssm_is_not(found: bool) -> None:
    code, environment = STAND_IN.format(found=found), os.environ | {"CC": "cc", "ESPALIER_BACKEND": "auto"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    words, name, warned = run.stdout.strip().split(" | ")
    if found:
        assert (words, name, warned) == ("triton (our kernels in Triton 3)", "triton", "0")
    else:
        assert name == "torch"
        assert "pip install mamba-ssm" in words
        assert "pip install triton" in words
        assert warned == "1"  # asked twice


@needs_library("triton", "triton")
def test_what_runs_on_cuda_alone_is_refused_on_a_cpu() -> None:
    with use_backend("triton"), pytest.raises(EspalierError, match="'triton' cannot run on cpu"):
        backend("cpu")
