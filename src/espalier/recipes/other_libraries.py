"""Recipes of other libraries' classes, small enough for a CPU: what structure does to the models people have."""

from __future__ import annotations

from dataclasses import replace

from espalier.recipes.base import Recipe, register_recipe
from espalier.recipes.convmixer import convmixer_filters
from espalier.recipes.vision import digits_vit


@register_recipe
def cifar10_vit_tiny() -> Recipe:
    """transformers' ViT-Tiny (192 wide, 12 layers, 3 heads) on 3,000 CIFAR-10 images at patch 8.

    Test accuracy on 2,000 images, minutes on one CPU core: ``espalier compare cifar10_vit_tiny --arms default
    mimetic``. The patch is coarse so that the depth, which is what structure acts through, fits a CPU. For a GPU:
    ``cifar10_vit``.
    """
    return replace(
        digits_vit(),
        name="cifar10_vit_tiny",
        dataset="cifar10",
        data_args={"train_limit": 3000, "test_limit": 2000},
        model="transformers_vit",
        model_args={"patch_size": 8, "embed_dim": 192, "depth": 12, "num_heads": 3},
        epochs=6,
        lr=1e-3,
        flip=True,
        eval_every=2,
    )


@register_recipe
def cifar10_vit_small() -> Recipe:
    """A small ViT of transformers (96 wide, 6 layers, 3 heads) on 2,500 CIFAR-10 images at patch 4.

    Test accuracy on 2,000 images, minutes on one CPU core: ``espalier compare cifar10_vit_small --arms default
    mimetic``. Against ``cifar10_vit_tiny`` it has four times the tokens and half the depth.
    """
    return replace(
        cifar10_vit_tiny(),
        name="cifar10_vit_small",
        data_args={"train_limit": 2500, "test_limit": 2000},
        model_args={"patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 3},
        epochs=8,
        eval_every=4,
    )


@register_recipe
def convnext_filters() -> Recipe:
    """A small ConvNeXt of transformers (kernel 7, stem of stride 4) on 2,000 CIFAR-10 images.

    Test accuracy on 2,000 images, under a minute on one CPU core: ``espalier compare convnext_filters --arms default
    covariance default-frozen covariance-frozen``. Residual branches start at full scale: at the class's own 1e-6 a run
    this short trains the stem and the head alone.
    """
    return replace(
        convmixer_filters(),
        name="convnext_filters",
        model="transformers_convnext",
        model_args={"patch_size": 4, "depths": (2, 2), "dims": (48, 96), "layer_scale": 1.0},
        lr=3e-3,
        weight_decay=0.05,
        schedule="cosine",
        warmup_epochs=1,
    )
