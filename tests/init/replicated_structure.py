"""Run by test_sharded under torchrun and alone: structure a model inside DDP, each rank with a seed of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import espalier
from espalier.cli.main import leave_process_group
from espalier.models import SequenceModel, VisionTransformer


def build() -> nn.Module:
    """Return a model with all three families, equal on every rank."""
    generator = torch.Generator().manual_seed(1)
    vision = VisionTransformer(img_size=8, patch_size=2, in_chans=1, embed_dim=48, depth=2, num_heads=3)
    vision.init_weights(generator)
    mixer = SequenceModel(20, 48, "mamba1 mamba2", head_dim=16)
    mixer.init_weights(generator)
    filters = nn.Conv2d(8, 8, 5, groups=8)
    nn.init.ones_(filters.weight)
    nn.init.zeros_(filters.bias)
    return nn.ModuleDict({"vision": vision, "mixer": mixer, "filters": filters})


def main(folder: Path) -> None:
    """Write this rank's weights; alone, those of one process with rank 0's seed."""
    ranks = torch.distributed.is_torchelastic_launched()
    if ranks:
        torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank() if ranks else 0
    model = build()
    wrapped = DistributedDataParallel(model) if ranks else model
    espalier.structure_(wrapped, generator=torch.Generator().manual_seed(5 + rank))
    save_file({name: p.detach().clone() for name, p in model.named_parameters()}, folder / f"rank{rank}.safetensors")
    if ranks:
        leave_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
