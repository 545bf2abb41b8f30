"""Two processes with FSDP2 shards write the very bits that one process writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file


def test_shards_hold_the_single_process_weights_bit_for_bit(tmp_path: Path) -> None:
    script = str(Path(__file__).parent / "sharded_structure.py")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for start, folder in (([], "one"), (torchrun, "two")):
        (tmp_path / folder).mkdir()
        result = subprocess.run(
            [sys.executable, *start, script, str(tmp_path / folder)],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            check=False,
        )
        assert result.returncode == 0, result.stderr
    one, two = (load_file(tmp_path / folder / "weights.safetensors") for folder in ("one", "two"))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        assert torch.equal(weight, two[name]), name
    assert not torch.equal(one["blocks.0.attn.qkv.weight"], one["blocks.1.attn.qkv.weight"])
    tables = [(tmp_path / folder / "table.txt").read_text() for folder in ("one", "two")]
    assert tables[0] == tables[1]
    assert tables[0].count("written") == 3
    assert tables[0].count("present") == 3
