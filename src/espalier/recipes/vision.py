"""Image classification recipes: small enough for a laptop first, the papers' settings after them."""

from __future__ import annotations

from dataclasses import replace

from espalier.recipes.base import Recipe, register_recipe


@register_recipe
def digits_vit() -> Recipe:
    """A small ViT on scikit-learn's 8×8 digits: test accuracy, seconds on one CPU core.

    ``espalier train digits_vit``; nothing is downloaded.
    """
    return Recipe(
        name="digits_vit",
        dataset="digits",
        model="vit",
        model_args={"patch_size": 2, "embed_dim": 48, "depth": 4, "num_heads": 3},
        epochs=10,
        batch_size=64,
        lr=3e-3,
        weight_decay=0.01,
        warmup_epochs=1,
        clip_norm=3.0,
        threads=1,
    )


@register_recipe
def digits_convmixer() -> Recipe:
    """A small ConvMixer on scikit-learn's 8×8 digits: test accuracy, seconds on one CPU core.

    ``espalier train digits_convmixer``; nothing is downloaded.
    """
    return Recipe(
        name="digits_convmixer",
        dataset="digits",
        model="convmixer",
        model_args={"dim": 48, "depth": 4, "kernel_size": 7, "patch_size": 1},
        epochs=6,
        batch_size=64,
        lr=1e-2,
        weight_decay=5e-3,
        schedule="piecewise",
        clip_norm=1.0,
        threads=1,
    )


@register_recipe
def fashion_vit() -> Recipe:
    """A small ViT on Fashion-MNIST: test accuracy, minutes on a CPU.

    ``espalier train fashion_vit --data DIR``.
    """
    return replace(
        digits_vit(),
        name="fashion_vit",
        dataset="fashion_mnist",
        model_args={"patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 4},
        batch_size=128,
        lr=1e-3,
        crop_padding=2,
        flip=True,
    )


@register_recipe
def cifar10_vit() -> Recipe:
    """ViT-Tiny on CIFAR-10 with the setting of the independent re-runs of mimetic initialisation.

    Test accuracy; 200 epochs, hours on one GPU: ``espalier train cifar10_vit --data DIR``. Cut ``--epochs`` and
    ``--model-args`` for a CPU. Not yet run here at full length.
    """
    return Recipe(
        name="cifar10_vit",
        dataset="cifar10",
        model="vit",
        model_args={"patch_size": 2, "embed_dim": 192, "depth": 12, "num_heads": 3},
        epochs=200,
        batch_size=512,
        lr=1e-3,
        weight_decay=0.01,
        warmup_epochs=10,
        clip_norm=3.0,
        eps=1e-3,
        crop_padding=4,
        flip=True,
        randaugment=(2, 9),
    )


@register_recipe
def convmixer_cifar10() -> Recipe:
    """ConvMixer-256/8 (kernel 5, patch 2) on CIFAR-10 with the published script's 25-epoch setting.

    Test accuracy; three minutes on one H100, some hours of one core with ``--precision bf16 --channels-last``:
    ``espalier train convmixer_cifar10 --data DIR``. What it reached: docs/results/index.md.
    """
    return Recipe(
        name="convmixer_cifar10",
        dataset="cifar10",
        model="convmixer",
        model_args={"dim": 256, "depth": 8, "kernel_size": 5, "patch_size": 2},
        epochs=25,
        batch_size=512,
        lr=0.05,
        weight_decay=0.005,
        schedule="piecewise",
        clip_norm=1.0,
        flip=True,
        randaugment=(2, 12),
    )
