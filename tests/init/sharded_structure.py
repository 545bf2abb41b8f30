"""Run by test_sharded under torchrun and alone: structure a model, sharded or not, and save its whole weights."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import espalier
from espalier.cli.main import leave_process_group
from espalier.models import VisionTransformer


def build() -> VisionTransformer:
    """Return a small vision transformer, equal on every rank, with a depthwise convolution beside it."""
    model = VisionTransformer(img_size=8, patch_size=2, in_chans=1, embed_dim=48, depth=2, num_heads=3)
    model.init_weights(torch.Generator().manual_seed(1))
    model.mixer = nn.Conv2d(5, 5, 5, padding=2, groups=5)  # shards of unequal size
    for parameter in model.mixer.parameters():
        nn.init.ones_(parameter)
    return model


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return every parameter, gathered."""
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in model.named_parameters()
    }


def main(folder: Path) -> None:
    """Write the whole weights of an ordinary and of a lazily built model, and the reports in words."""
    many = torch.distributed.is_torchelastic_launched()
    if many:
        torch.distributed.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    rank = torch.distributed.get_rank() if many else 0
    model = build()
    if many:
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model(torch.zeros(2, 1, 8, 8))  # leaves the root's whole parameters behind: they must not be written to
    shards = dict(model.named_parameters())
    # Each rank brings another generator: rank 0's must count.
    report = espalier.structure_(model, generator=torch.Generator().manual_seed(5 + rank), guard=True)
    assert dict(model.named_parameters()).keys() == shards.keys()
    if many:
        assert all(hasattr(p, "full_tensor") for p in model.parameters())
    with torch.inference_mode():  # as in an evaluation loop
        after = espalier.audit(model, against=report)
    results = whole(model)
    table = f"{report}\n{after}\n{[row.mark for row in report.layers]}"

    with torch.device("meta"):
        lazy = VisionTransformer(img_size=8, patch_size=2, in_chans=1, embed_dim=48, depth=2, num_heads=3)
    if many:
        fully_shard(lazy, mesh=mesh)
    assert {row.status for row in espalier.structure_(lazy).layers} == {"skipped"}
    lazy.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in lazy.parameters():
            parameter.fill_(0.5)
    espalier.structure_(lazy, generator=torch.Generator().manual_seed(6))
    results |= {f"lazy.{name}": tensor for name, tensor in whole(lazy).items()}

    tied = build()
    tied.blocks[1].attn.qkv.weight = tied.blocks[0].attn.qkv.weight
    if many:
        fully_shard(tied, mesh=mesh)
    rows = espalier.structure_(tied, generator=torch.Generator().manual_seed(7)).layers
    assert [row.status for row in rows] == ["written", "skipped", "written"], rows
    results |= {f"tied.{name}": tensor for name, tensor in whole(tied).items()}
    if rank == 0:
        save_file(results, folder / "weights.safetensors")
        (folder / "table.txt").write_text(table)
    if many:
        leave_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
