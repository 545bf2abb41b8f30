from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from espalier.train import load_run


def test_two_processes_train_like_one(tmp_path: Path) -> None:
    script = str(Path(__file__).parent / "distributed_runs.py")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for start, folder in (([], "one"), (torchrun, "two")):
        result = subprocess.run(
            [sys.executable, *start, script, str(tmp_path / folder)],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            check=False,
        )
        assert result.returncode == 0, result.stderr
    for kind in ("images", "tokens"):  # the ranks' shares of a token batch hold different numbers of targets
        one, two = (load_run(tmp_path / folder / kind) for folder in ("one", "two"))
        weights = [load_file(run.path / "final.safetensors") for run in (one, two)]
        for name, weight in weights[0].items():
            torch.testing.assert_close(weight, weights[1][name], rtol=1e-4, atol=1e-6)
        assert len(one.rows) == len(two.rows)
        for left, right in zip(one.rows, two.rows, strict=True):
            for key in ("train_loss", "test/loss", "test/accuracy"):
                assert (right[key] is None) == (left[key] is None)
                assert (right[key] or 0.0) == pytest.approx(left[key] or 0.0, rel=1e-5)
