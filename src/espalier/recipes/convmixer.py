"""ConvMixer recipes: the paper's settings, and one small enough to settle questions about filters on a CPU."""

from __future__ import annotations

from dataclasses import replace

from espalier.recipes.base import Recipe, register_recipe
from espalier.recipes.vision import convmixer_cifar10, digits_convmixer


@register_recipe
def convmixer_filters() -> Recipe:
    """A small ConvMixer with large kernels on 2,000 CIFAR-10 images: what filters do, minutes a run at most.

    Test accuracy on 2,000 images; one CPU thread. ``espalier compare convmixer_filters --arms default-frozen
    covariance-frozen default covariance``. The net is the CIFAR-10 one, narrower and shallower, with the paper's larger
    kernel; a few epochs on few images fit little, so filters that are good from the start show.
    """
    return replace(
        digits_convmixer(),
        name="convmixer_filters",
        dataset="cifar10",
        data_args={"train_limit": 2000, "test_limit": 2000},
        model_args={"dim": 48, "depth": 4, "kernel_size": 9, "patch_size": 2},
        epochs=8,
        flip=True,
        eval_every=4,
        channels_last=True,
    )


@register_recipe
def convmixer_cifar10_100() -> Recipe:
    """ConvMixer-256/8 (kernel 5, patch 2) on CIFAR-10: the published script's setting for 100 epochs.

    Test accuracy; four times the steps of ``convmixer_cifar10``, for a GPU:
    ``espalier train convmixer_cifar10_100 --data DIR``. Not yet run here at full length.
    """
    return replace(convmixer_cifar10(), name="convmixer_cifar10_100", epochs=100)


@register_recipe
def convmixer_cifar10_96() -> Recipe:
    """ConvMixer-256/8 with kernel 9 and patch 1 on CIFAR-10: the long setting that the paper reports.

    Test accuracy; 200 epochs at full resolution, many hours on one GPU: ``espalier train convmixer_cifar10_96 --data
    DIR``. What is not stated of it (batch, weight decay, RandAugment) is that of ``convmixer_cifar10``. Not yet run
    here at full length.
    """
    return replace(
        convmixer_cifar10(),
        name="convmixer_cifar10_96",
        model="convmixer_256_8_ks9_p1",
        model_args={},
        epochs=200,
        lr=0.01,
        eps=1e-3,
        mixup=0.5,
        cutmix=0.5,
        erasing=0.25,
        crop_scale=(0.75, 1.0),
    )


@register_recipe
def convmixer_imagenet() -> Recipe:
    """ConvMixer-1536/20 (kernel 9, patch 7) on a folder of ImageNet's images: the paper's 150-epoch setting.

    Validation accuracy; days on ten GPUs, with ``DIR/train`` and ``DIR/val`` by class:
    ``torchrun --nproc-per-node 10 --no-python espalier train convmixer_imagenet --data DIR``. The images are decoded as
    they are needed, by as many processes as the machine has cores; WebDataset's shards: ``--dataset shards``. The
    smallest crop is timm's default. For ConvMixer-768/32: ``--model convmixer_768_32 --epochs 300``. Not yet run here
    at full length.
    """
    return replace(
        convmixer_cifar10_96(),
        name="convmixer_imagenet",
        dataset="folder",
        data_args={"size": 224, "storage": "stream"},
        model="convmixer_1536_20",
        epochs=150,
        batch_size=640,
        weight_decay=2e-5,
        label_smoothing=0.1,
        crop_scale=(0.08, 1.0),
        randaugment=(2, 9),
        precision="bf16",
        channels_last=True,
    )
