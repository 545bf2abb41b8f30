"""A run for distributed_runs whose ranks draw different structure, and whose model is looked at after checkpoints."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import standins
import torch
from torch import nn

import espalier
from espalier.init import StructureReport
from espalier.recipes import Recipe
from espalier.train import loop


def draw_by_rank(model: nn.Module, *, generator: torch.Generator) -> StructureReport:
    """Write mimetic structure whose noise differs from rank to rank, as an initialisation of a user's own may do."""
    return espalier.structure_(model, generator=torch.Generator().manual_seed(int(os.environ.get("RANK", "0"))))


def recipe() -> Recipe:
    """Return a run of a small vision transformer."""
    shape = {"img_size": 6, "patch_size": 3, "in_chans": 3, "embed_dim": 24, "depth": 2, "num_heads": 3}
    return standins.recipe(
        model="vit", model_args=shape, init=f"{Path(__file__)}:{draw_by_rank.__name__}", eps=1e-3, ema_decay=0.9
    )


@cache
def look_after_checkpoints(rank: int) -> None:
    """From now on, append to ``RUN.RANK.jsonl`` what audit and doctor say of the model after every checkpoint."""
    save_checkpoint = loop.save_checkpoint

    def save_and_look(folder: Path, model: nn.Module, *rest: Any) -> None:
        save_checkpoint(folder, model, *rest)
        shards = sorted(name for name, p in model.named_parameters() if hasattr(p, "full_tensor"))
        rows = [asdict(row) for row in espalier.audit(model).layers]
        findings = [(f.severity, f.check, f.layer) for f in espalier.diagnose(model).findings]
        left = sorted(name for name, p in model.named_parameters() if hasattr(p, "full_tensor"))
        with folder.with_name(f"{folder.name}.{rank}.jsonl").open("a") as file:
            print(json.dumps({"rows": rows, "findings": findings, "shards": shards, "left": left}), file=file)

    loop.save_checkpoint = save_and_look
