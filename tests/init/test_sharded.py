"""Two processes, with FSDP2 shards or inside DDP, write the weights that one process writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(script: str, *start: str, folder: Path) -> None:
    """Run one of the scripts beside this file, under a launcher or alone."""
    folder.mkdir()
    result = subprocess.run(
        [sys.executable, *start, str(Path(__file__).parent / script), str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_shards_hold_the_single_process_weights_bit_for_bit(tmp_path: Path) -> None:
    run("sharded_structure.py", folder=tmp_path / "one")
    run("sharded_structure.py", *TORCHRUN, folder=tmp_path / "two")
    one, two = (load_file(tmp_path / folder / "weights.safetensors") for folder in ("one", "two"))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        assert torch.equal(weight, two[name]), name
    assert not torch.equal(one["blocks.0.attn.qkv.weight"], one["blocks.1.attn.qkv.weight"])
    tables = [(tmp_path / folder / "table.txt").read_text() for folder in ("one", "two")]
    assert tables[0] == tables[1]
    assert tables[0].count("written") == 3
    assert tables[0].count("present") == 3


def test_ranks_inside_ddp_take_the_draw_of_rank_0(tmp_path: Path) -> None:
    run("replicated_structure.py", folder=tmp_path / "one")
    run("replicated_structure.py", *TORCHRUN, folder=tmp_path / "two")
    alone = load_file(tmp_path / "one" / "rank0.safetensors")
    for rank in range(2):
        weights = load_file(tmp_path / "two" / f"rank{rank}.safetensors")
        assert weights.keys() == alone.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(weight, alone[name], rtol=1e-6, atol=1e-7, msg=f"rank {rank}, {name}")
