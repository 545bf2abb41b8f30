"""ConvMixer against other nets of its size, and what patches do (docs/results/convmixer.md).

    python experiments/queue.py --only convmixer-nets --deadline 4h                # needs ESPALIER_DATA with cifar-10

Nets of about 0.3 million parameters see 10,000 CIFAR-10 images for 10 epochs, each with its own best of four rates:
some five minutes of one core a trial.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from espalier.recipes import Recipe
from experiments import nets  # noqa: F401  registers its models
from experiments.experiment import Experiment

BASE = Recipe(
    name="convmixer_nets",
    dataset="cifar10",
    data_args={"train_limit": 10000},
    model="convmixer",
    model_args={"dim": 176, "depth": 8, "kernel_size": 5, "patch_size": 4},
    epochs=10,
    batch_size=64,
    weight_decay=5e-3,
    warmup_epochs=1,
    clip_norm=1.0,
    crop_padding=4,
    flip=True,
    eval_every=2,
    channels_last=True,
    threads=1,
)
FEWER = replace(BASE, data_args={"train_limit": 5000}, eval_every=1)
NETS: Mapping[str, Mapping[str, Any]] = {
    "convmixer": {},
    "vit": {"model": "vit", "model_args": {"patch_size": 4, "embed_dim": 72, "depth": 5, "num_heads": 4}},
    "mlp-mixer": {
        "model": "mlp_mixer",
        "model_args": {"dim": 104, "depth": 6, "patch_size": 4, "token_hidden": 64, "hidden": 208},
    },
    "resnet": {"model": "cifar_resnet", "model_args": {"blocks": 3}},
}
EQUAL_PARAMETERS = Experiment(
    "convmixer-nets",
    "ConvMixer, ViT, MLP-Mixer and ResNet-20 at 0.3 million parameters, 10,000 images, 10 epochs",
    BASE,
    NETS,
    (1e-3, 3e-3, 1e-2, 3e-2),
    seeds=3,
    minutes=5.0,
    pairs=(("convmixer", "vit"), ("convmixer", "mlp-mixer"), ("convmixer", "resnet")),
)


def patch_arms(model: str, model_args: Mapping[str, Any], epochs: Mapping[int, int]) -> dict[str, Mapping[str, Any]]:
    """Return one arm a patch size, the finest first, each with the epochs that cost the same multiply-adds."""
    return {
        f"patch-{patch}": {
            "model": model,
            "model_args": {**model_args, "patch_size": patch},
            "epochs": count,
            "eval_every": count,
            "warmup_epochs": 0.1 * count,
        }
        for patch, count in epochs.items()
    }


PATCHES = {
    "convmixer": Experiment(
        "convmixer-patches",
        "ConvMixer-64/4 with patches of 1, 2 and 4 pixels at equal multiply-adds",
        FEWER,
        # 1,024, 256 and 64 places, all layers linear in them.
        patch_arms("convmixer", {"dim": 64, "depth": 4, "kernel_size": 5}, {1: 1, 2: 4, 4: 16}),
        (3e-3, 1e-2, 3e-2),
        seeds=3,
        minutes=2.0,
    ),
    "vit": Experiment(
        "vit-patches",
        "ViT, 64 wide, 4 layers, with patches of 1, 2 and 4 pixels at equal multiply-adds",
        # Half of ConvMixer's images, and a fifth of the test set: 1,024 places cost twenty minutes of a core otherwise.
        replace(FEWER, data_args={"train_limit": 2500, "test_limit": 2000}),
        # A block takes 12·D² T + 2·D·T² multiply-adds: 184, 21 and 3.7 million for T = 1,024, 256 and 64.
        patch_arms("vit", {"embed_dim": 64, "depth": 4, "num_heads": 4}, {1: 1, 2: 9, 4: 50}),
        (1e-3, 3e-3, 1e-2),
        seeds=3,
        minutes=8.0,
    ),
}
