"""Run by test_distributed under torchrun and alone: the same two runs into the folder given."""

from __future__ import annotations

import sys
from pathlib import Path

import standins
import torch

from espalier import data, models
from espalier.train import train

data.build_source = standins.build_source
models.build_model = standins.build_model

folder = Path(sys.argv[1])
images = {"model_args": {"dropout": 0.0, "norm": False}, "accumulate": 2, "ema_decay": 0.9}
train(standins.recipe(eps=1e-3, clip_norm=0.5, **images), folder / "images")
train(standins.recipe(eps=1e-3, dataset="echo", model="tied"), folder / "tokens")
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()  # left to the interpreter's end, its threads may abort the process
