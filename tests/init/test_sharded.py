"""Two or four processes, with FSDP2 shards or inside DDP, write the weights that one process writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


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


@pytest.mark.slow
def test_shards_hold_the_single_process_weights_bit_for_bit(tmp_path: Path) -> None:
    run("sharded_structure.py", folder=tmp_path / "1")
    one = load_file(tmp_path / "1" / "weights.safetensors")
    table = (tmp_path / "1" / "table.txt").read_text()
    assert not torch.equal(one["blocks.0.attn.qkv.weight"], one["blocks.1.attn.qkv.weight"])
    assert table.count("written") == 3
    assert table.count("present") == 3
    for ranks in ("2", "4"):
        run("sharded_structure.py", *TORCHRUN, ranks, folder=tmp_path / ranks)
        found = load_file(tmp_path / ranks / "weights.safetensors")
        assert one.keys() == found.keys()
        for name, weight in one.items():
            assert torch.equal(weight, found[name]), f"{name}, {ranks} ranks"
        assert (tmp_path / ranks / "table.txt").read_text() == table


@pytest.mark.slow
def test_ranks_inside_ddp_take_the_draw_of_rank_0(tmp_path: Path) -> None:
    run("replicated_structure.py", folder=tmp_path / "one")
    run("replicated_structure.py", *TORCHRUN, "2", folder=tmp_path / "two")
    alone = load_file(tmp_path / "one" / "rank0.safetensors")
    for rank in range(2):
        weights = load_file(tmp_path / "two" / f"rank{rank}.safetensors")
        assert weights.keys() == alone.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(weight, alone[name], rtol=1e-6, atol=1e-7, msg=f"rank {rank}, {name}")
