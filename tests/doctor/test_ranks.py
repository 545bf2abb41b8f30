"""Two processes: replicas that differ and shards that do not are errors, on both ranks alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def test_ranks_are_compared(tmp_path: Path) -> None:
    script, out = str(Path(__file__).parent / "distributed_doctor.py"), tmp_path / "found.json"
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, str(out)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(out.read_text())
    assert all(case["ranks_agree"] for case in found.values())
    assert found["agree"]["findings"] == found["sharded"]["findings"] == []
    differ = found["differ"]["findings"]
    assert sorted(layer for _, _, layer in differ) == ["0.bias", "0.weight", "1.bias", "1.weight"]
    assert {(severity, check) for severity, check, _ in differ} == {("error", "ranks")}
    # The repeat also shows in the gathered weight, which holds the shard twice.
    assert found["same shard"]["findings"] == [["error", "equal-units", "1.weight"], ["error", "ranks", "1.weight"]]
    assert found["nan"]["findings"] == [["error", "not-finite", "0.bias"]]
