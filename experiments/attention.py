"""Attention: what mimetic initialisation does to vision transformers (docs/results/attention.md).

    python experiments/queue.py --only attention-cifar10 --deadline 8h             # needs ESPALIER_DATA with cifar-10

The small setting takes minutes a trial; all 50,000 images of CIFAR-10, 12 epochs at patch 4, take over an hour of one
core with instructions for bf16, and two minutes of a sixth of an H100 (``make gpu`` runs them there).
"""

from __future__ import annotations

from dataclasses import replace

from espalier.recipes import get_recipe
from experiments.experiment import Experiment

ARMS = ("default", "mimetic")

SMALL = Experiment(
    "attention-cifar10-small",
    "ViT, 96 wide, 6 layers, patch 4, on 2,500 CIFAR-10 images",
    get_recipe("cifar10_vit_small"),
    ARMS,
    (1e-4, 3e-4, 1e-3, 3e-3),
    seeds=5,
    minutes=3.0,
)
CIFAR10 = Experiment(
    "attention-cifar10",
    "ViT, 192 wide, 6 layers, patch 4, on all 50,000 CIFAR-10 images, 12 epochs",
    replace(
        get_recipe("cifar10_vit"),
        model_args={"patch_size": 4, "embed_dim": 192, "depth": 6, "num_heads": 3},
        epochs=12,
        batch_size=128,
        warmup_epochs=0.6,
        randaugment=None,
        precision="bf16",
        threads=1,
    ),
    ARMS,
    (5e-4, 1e-3, 2e-3),
    seeds=3,
    minutes=80.0,
    extend=False,
)
