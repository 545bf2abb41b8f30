"""The choice of what runs the scans: built once, safely, and never silently worse."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from espalier.errors import EspalierError
from espalier.nn import Mamba1, use_backend
from espalier.nn.kernels import build
from needs import KERNELS

PROBE = """
import warnings
from espalier.nn import backend
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    backend(); print(backend().name, "|", backend().reason, "|", len(seen))
"""


def probe(**environment: str) -> list[str]:
    run = subprocess.run(
        [sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    return [part.strip() for part in run.stdout.split("|")]


def test_without_a_compiler_the_fallback_is_announced_once(tmp_path: Path) -> None:
    name, reason, warnings = probe(PATH=str(tmp_path), ESPALIER_CACHE=str(tmp_path))
    assert (name, warnings) == ("torch", "1")
    assert "no C++ compiler" in reason


def test_a_compiler_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "error: broken" >&2\nexit 1\n')
    compiler.chmod(0o755)
    cache = tmp_path / "cache"
    name, reason, _ = probe(PATH=str(tmp_path), CXX=str(compiler), ESPALIER_CACHE=str(cache))
    assert name == "torch"
    assert "error: broken" in reason
    assert list(cache.iterdir()) == []


def test_an_unwritable_cache_is_announced_and_the_fallback_computes_the_same(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    script = (
        PROBE
        + """
import torch, sys
from espalier.nn import Mamba1
torch.manual_seed(0)
x = torch.randn(2, 9, 8)
torch.save(Mamba1(8, 4, generator=torch.Generator().manual_seed(0))(x).detach(), sys.argv[1])
"""
    )
    saved = tmp_path / "out.pt"
    env = {**os.environ, "ESPALIER_CACHE": str(tmp_path / "file" / "cache")}
    run = subprocess.run(
        [sys.executable, "-c", script, str(saved)], env=env, capture_output=True, text=True, check=True, timeout=200
    )
    name, reason, warnings = (part.strip() for part in run.stdout.split("|"))
    assert (name, warnings) == ("torch", "1")
    assert "cannot write" in reason
    torch.manual_seed(0)
    x = torch.randn(2, 9, 8)
    here = Mamba1(8, 4, generator=torch.Generator().manual_seed(0))(x)
    torch.testing.assert_close(torch.load(saved, weights_only=True), here.detach(), rtol=1e-5, atol=1e-6)


def test_demanding_what_cannot_run_is_refused() -> None:
    with pytest.raises(EspalierError, match="cannot run on cpu"), use_backend("mamba_ssm"):
        pass
    with pytest.raises(EspalierError, match="unknown backend 'tritn'"), use_backend("tritn"):
        pass


@KERNELS
@pytest.mark.slow
def test_two_processes_build_at_once(tmp_path: Path) -> None:
    code = "from espalier.nn.kernels.build import build; print(build())"
    env = {**os.environ, "ESPALIER_CACHE": str(tmp_path)}
    runs = [subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) for _ in "ab"]
    paths = {run.communicate(timeout=600)[0].strip() for run in runs}
    assert all(run.returncode == 0 for run in runs)
    assert {str(path) for path in tmp_path.iterdir()} == paths
    assert len(paths) == 1


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ESPALIER_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.cache_folder() == tmp_path / "espalier"
    monkeypatch.setenv("ESPALIER_CACHE", str(tmp_path / "own"))
    assert build.cache_folder() == tmp_path / "own"
