"""Images as a source of batches: the whole set as one uint8 tensor on the device, augmented there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from espalier.data.arguments import find_data, read_arguments
from espalier.data.augment import to_unit
from espalier.data.augmentation import Augmentation
from espalier.data.generated import GENERATED, GeneratedImages, read_generated
from espalier.data.labelled import ImageData
from espalier.data.normalizer import build_normalizer, value_counts
from espalier.data.published import read_cifar10, read_digits, read_fashion_mnist
from espalier.data.source import contents_digest, epoch_order, image_args, require_step
from espalier.errors import EspalierError, require_known
from espalier.randomness import derive_generator
from espalier.sizes import whole_number

if TYPE_CHECKING:
    from espalier.recipes.base import Recipe

LIMITS: dict[str, Any] = {"train_limit": None, "test_limit": None}
"""Arguments of every source of images: how many of the stratified order are used."""


class ImageBatches:
    """What the sources of images have in common: the classes, the augmentation and the image's shape.

    Raises:
        EspalierError: a padding that the images are too small for.
    """

    normalizer: nn.Module

    def __init__(
        self, splits: dict[str, Any], names: tuple[str, ...], augmentation: Augmentation | None, shape: Sequence[int]
    ) -> None:
        self.augmentation = augmentation or Augmentation()
        if (padding := self.augmentation.crop_padding) >= (side := min(shape[1:])):
            raise EspalierError(f"crop_padding is {padding}, the images' side {side}: lower it")
        self.class_names = names
        self.model_args: Mapping[str, Any] = {"num_classes": len(names), **image_args(shape)}
        self.eval_splits: tuple[str, ...] = ("test",)
        self._splits = splits

    def steps_per_epoch(self, batch_size: int) -> int:
        """Return the number of whole batches in the training set."""
        return len(self._splits["train"].labels_N) // batch_size

    def _finish(self, pixels_BCHW: Tensor, labels_B: Tensor, seed: int, *keys: int) -> tuple[Tensor, Tensor]:
        """Return a training batch augmented, by draws that derive from the keys, and normalised, and its targets."""
        generator = derive_generator(seed, "augment", *keys, device=labels_B.device)
        images_BCHW, targets = self.augmentation(pixels_BCHW, labels_B, len(self.class_names), generator=generator)
        return self.normalizer(images_BCHW), targets


class ImageSource(ImageBatches):
    """A ``Source`` of image batches: a pure function of (seed, epoch, step).

    Batches of both kinds come normalised, ready for the network; ``images`` gives pixels in [0, 1], for which the
    network is ``nn.Sequential(source.normalizer, model)``.

    Args:
        data: the images.
        augmentation: what is done to training batches.
        normalize: ``mean_std``, ``mean`` or ``none``: per channel, measured on the training set as it is used.
        generated: images that fill a share of every training batch. An epoch keeps its number of batches; the real
            ones of a batch are the next of the epoch's permutation.

    Raises:
        EspalierError: unknown ``normalize``, or a padding that the images are too small for.
    """

    def __init__(
        self,
        data: ImageData,
        augmentation: Augmentation | None = None,
        normalize: str = "mean_std",
        generated: GeneratedImages | None = None,
    ) -> None:
        splits = {"train": data.train, "test": data.test}
        super().__init__(splits, data.class_names, augmentation, data.train.images_NCHW.shape[1:])
        self.normalizer = build_normalizer(value_counts(data.train.images_NCHW), normalize)
        self._generated = generated

    @property
    def digest(self) -> str:
        """Digest of the classes, their order, and every image and label."""
        sets = [*self._splits.values(), *([self._generated.images] if self._generated else [])]
        tensors = [tensor.cpu() for images in sets for tensor in (images.images_NCHW, images.labels_N)]
        return contents_digest(*self.class_names, *tensors)

    def to(self, device: torch.device | str) -> Self:
        """Move images, labels and the normaliser to ``device`` and return the source."""
        self._splits = {name: split.to(device) for name, split in self._splits.items()}
        self._generated = self._generated.to(device) if self._generated else None
        self.normalizer = self.normalizer.to(device)
        return self

    def train_batch(self, seed: int, epoch: int, step: int, batch_size: int) -> tuple[Tensor, Tensor]:
        """Return batch ``step`` of ``epoch``: augmented, normalised images and their targets.

        Raises:
            IndexError: the epoch has no such step.
        """
        require_step(step, self.steps_per_epoch(batch_size), batch_size)
        train = self._splits["train"]
        real = batch_size - (self._generated.count(batch_size) if self._generated else 0)
        chosen_M = epoch_order(len(train), seed, epoch)[step * real : (step + 1) * real]
        batch = train.take(chosen_M.to(train.labels_N.device))
        if self._generated:
            batch = self._generated.join(batch, seed, epoch, step, batch_size)
        return self._finish(batch.images_NCHW, batch.labels_N, seed, epoch, step)

    def eval_batches(self, split: str, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the normalised images and labels of ``split`` in their stored order.

        Raises:
            EspalierError: unknown split.
        """
        require_known("split", split, self._splits)
        chosen = self._splits[split]
        batches = zip(chosen.images_NCHW.split(batch_size), chosen.labels_N.split(batch_size), strict=True)
        for pixels_BCHW, labels_B in batches:
            yield self.normalizer(to_unit(pixels_BCHW)), labels_B

    def images(self, split: str, limit: int | None = None) -> tuple[Tensor, Tensor]:
        """Return the first ``limit`` images of ``train`` or ``test`` (None: all) in [0, 1], and their labels.

        Raises:
            EspalierError: unknown split, or a limit below 1.
        """
        require_known("split", split, self._splits)
        chosen = self._splits[split]
        count = len(chosen) if limit is None else whole_number("limit", limit)
        return to_unit(chosen.images_NCHW[:count]), chosen.labels_N[:count]


def digits_source(recipe: Recipe) -> ImageSource:
    """Return scikit-learn's 8×8 digits (arguments: ``train_limit``, ``test_limit``)."""
    arguments = read_arguments(recipe, LIMITS, reads_files=False)
    return ImageSource(read_digits().limited(**arguments), Augmentation.from_recipe(recipe), recipe.normalize)


def cifar10_source(recipe: Recipe) -> ImageSource:
    """Return CIFAR-10 from ``data_path`` or ``$ESPALIER_DATA/cifar10``.

    Arguments: ``train_limit``, ``test_limit``; ``generated``, ``generated_share`` (see ``read_generated``).
    """
    return _from_files(recipe, "cifar10", read_cifar10)


def fashion_mnist_source(recipe: Recipe) -> ImageSource:
    """Return Fashion-MNIST from ``data_path`` or ``$ESPALIER_DATA/fashion-mnist`` (arguments as for CIFAR-10)."""
    return _from_files(recipe, "fashion-mnist", read_fashion_mnist)


def _from_files(recipe: Recipe, subfolder: str, read: Callable[[Path], ImageData]) -> ImageSource:
    arguments = read_arguments(recipe, LIMITS | GENERATED)
    data = read(find_data(recipe, subfolder))
    limited = data.limited(arguments["train_limit"], arguments["test_limit"])
    generated = read_generated(arguments, data.train, len(data.class_names))
    if generated:
        generated.count(recipe.batch_size)  # refused here, not in the first step
    return ImageSource(limited, Augmentation.from_recipe(recipe), recipe.normalize, generated)
