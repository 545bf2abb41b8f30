"""Attention: what mimetic initialisation does to vision transformers (docs/results/attention.md).

    python experiments/queue.py --only attention-cifar10 --deadline 8h             # needs ESPALIER_DATA with cifar-10

The small setting takes minutes a trial; all 50,000 images of CIFAR-10, 10 epochs at patch 4, take half an hour to an
hour of one core with instructions for bf16, and far too long without them.
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
    "ViT, 128 wide, 6 layers, patch 4, on all 50,000 CIFAR-10 images, 10 epochs",
    replace(
        get_recipe("cifar10_vit"),
        model_args={"patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4},
        epochs=10,
        batch_size=128,
        warmup_epochs=1,
        eps=1e-8,
        randaugment=None,
        precision="bf16",
        threads=1,
    ),
    ARMS,
    (3e-4, 1e-3, 3e-3),
    seeds=3,
    minutes=35.0,
    extend=False,
)
