"""What is done to a training batch, as the recipe states it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from espalier.data import augment
from espalier.data.randaugment import rand_augment
from espalier.errors import EspalierError

if TYPE_CHECKING:
    from espalier.recipes.base import Recipe


@dataclass(frozen=True)
class Augmentation:
    """What is done to a training batch, in this order; the fields are those of the recipe."""

    crop_padding: int = 0
    crop_scale: tuple[float, float] = (1.0, 1.0)
    flip: bool = False
    randaugment: tuple[int, int] | None = None
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        operations, magnitude = self.randaugment or (1, 1)
        for name, right, remedy in (
            ("crop_padding", self.crop_padding >= 0, "pixels from 0"),
            ("crop_scale", 0 < low <= high <= 1, "a range of area shares within (0, 1]"),
            ("randaugment", operations >= 1 and 0 < magnitude < 30, "(operations from 1, magnitude between 0 and 30)"),
            ("erasing", 0 <= self.erasing <= 1, "a probability"),
            ("mixup", self.mixup >= 0, "a Beta parameter, 0 for none"),
            ("cutmix", self.cutmix >= 0, "a Beta parameter, 0 for none"),
        ):
            if not right:
                raise EspalierError(f"{name} is {getattr(self, name)!r}: give {remedy}")

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> Augmentation:
        """Return the recipe's augmentation.

        Raises:
            EspalierError: a field is out of its range.
        """
        return cls(**{field.name: getattr(recipe, field.name) for field in fields(cls)})

    def __call__(
        self, pixels_BCHW: Tensor, labels_B: Tensor, num_classes: int, *, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return augmented images in [0, 1] and their targets.

        Args:
            pixels_BCHW: uint8 images.
            labels_B: class indices.
            num_classes: number of classes K.
            generator: source of every draw, on the images' device.

        Returns:
            Images ``(B, C, H, W)`` in float32, and ``labels_B`` or, after mixup or cutmix, probabilities ``(B, K)``.
        """
        if self.crop_padding:
            pixels_BCHW = augment.random_crop(pixels_BCHW, self.crop_padding, generator=generator)
        images_BCHW = augment.to_unit(pixels_BCHW)
        if tuple(self.crop_scale) != (1.0, 1.0):
            images_BCHW = augment.random_resized_crop(images_BCHW, self.crop_scale, generator=generator)
        if self.flip:
            images_BCHW = augment.random_flip(images_BCHW, generator=generator)
        if self.randaugment is not None:
            images_BCHW = rand_augment(images_BCHW, *self.randaugment, generator=generator)
        if self.erasing:
            images_BCHW = augment.random_erasing(images_BCHW, self.erasing, generator=generator)
        if not (self.mixup or self.cutmix):
            return images_BCHW, labels_B
        labels_BK = F.one_hot(labels_B, num_classes).to(images_BCHW.dtype)
        # With both asked for, each batch gets one of them, evenly, as in the recipes that use both.
        if self.mixup and (not self.cutmix or augment.draw_seed(generator) % 2):
            return augment.mixup(images_BCHW, labels_BK, self.mixup, generator=generator)
        return augment.cutmix(images_BCHW, labels_BK, self.cutmix, generator=generator)
