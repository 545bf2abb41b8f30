"""Run by test_ranks under torchrun: diagnose models whose ranks agree, differ, or hold the same shard."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import espalier
from espalier.cli.main import leave_process_group


def build(seed: int) -> nn.Sequential:
    """Return two linear layers."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 8))


def sharded(same: bool) -> nn.Sequential:
    """Return the model sharded by FSDP2; ``same`` fills every rank's shard of a layer from one generator."""
    model = build(1)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    if same:
        shard = model[1].weight
        assert isinstance(shard, DTensor)
        with torch.no_grad():
            shard.to_local().normal_(std=0.1, generator=torch.Generator().manual_seed(3))
    return model


def main(out: Path) -> None:
    """Write the findings on every model, and whether both ranks have the same."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    late = sharded(False)
    with torch.no_grad():
        late[0].bias.to_local()[rank] = torch.nan  # each rank breaks its own shard
    models = {
        "agree": build(1), "differ": build(rank), "sharded": sharded(False), "same shard": sharded(True), "nan": late,
    }  # fmt: skip
    found = {}
    for name, model in models.items():
        findings = [(f.severity, f.check, f.layer) for f in espalier.diagnose(model).findings]
        both: list[list[tuple[str, str, str]]] = [[], []]
        torch.distributed.all_gather_object(both, findings)
        found[name] = {"findings": findings, "ranks_agree": both[0] == both[1]}
    # Ranks of a data loader or a probe may run at different speeds; nothing is left sharded differently.
    assert all(isinstance(p, DTensor) for p in models["sharded"].parameters())
    if rank == 0:
        out.write_text(json.dumps(found))
    leave_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
