"""What a net that was trained on images expects of an image, kept in its run folder: size, normalisation, classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from espalier.data.augment import to_unit
from espalier.data.decode import upright_rgb
from espalier.errors import EspalierError, require
from espalier.files import read_object, read_regular
from espalier.nn.lipschitz.normalisation import Normalize
from espalier.recipes.validation import from_values

IMAGES = "images.json"
# Files whose names the message about unreadable ones lists.
_LISTED = 20


@dataclass(frozen=True)
class ImageInput:
    """The input of a net on images: uint8 pixels ``(channels, height, width)``, divided by 255, then normalised.

    ``mean`` and ``std`` hold one value a channel in units of [0, 1]; they are empty where nothing is normalised.
    """

    class_names: tuple[str, ...]
    channels: int
    height: int
    width: int
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @classmethod
    def of(cls, source: Any) -> ImageInput | None:
        """Return the input that a source of images feeds; None for sources of other things."""
        names, normalizer = getattr(source, "class_names", None), getattr(source, "normalizer", None)
        arguments = source.model_args
        if names is None or normalizer is None or "img_size" not in arguments:
            return None
        side = arguments["img_size"]
        height, width = (side, side) if isinstance(side, int) else side
        statistics = (getattr(normalizer, name, None) for name in ("mean", "std"))
        mean, std = (() if each is None else tuple(each.flatten().tolist()) for each in statistics)
        return cls(tuple(map(str, names)), arguments["in_chans"], height, width, mean, std)

    @classmethod
    def load(cls, folder: Path) -> ImageInput:
        """Read it from a run folder.

        Raises:
            EspalierError: the run was not trained on images, or its file is damaged.
        """
        try:
            found = from_values(cls, read_object(folder / IMAGES), IMAGES)
            if not all(0 < size < 2**20 for size in (found.channels, found.height, found.width)):
                raise ValueError("channels, height and width are no sizes of an image")
            if not {len(found.mean), len(found.std)} <= {0, 1, found.channels} or not all(s > 0 for s in found.std):
                raise ValueError("mean and std hold no positive deviation a channel")
            return found
        except FileNotFoundError:
            raise EspalierError(f"run {folder} has no {IMAGES}: only runs on data sets of images have one") from None
        except (OSError, ValueError) as error:
            raise EspalierError(f"{folder / IMAGES} is damaged ({error}): train into another folder") from None

    def normalizer(self) -> nn.Module:
        """Return the module that normalises pixels in [0, 1]."""
        return Normalize(self.mean, self.std or 1.0) if self.mean else nn.Identity()

    def read(self, files: Sequence[Path]) -> Tensor:
        """Return image files as the net is shown them in evaluation before they are normalised: ``(N, C, H, W)``.

        Upright, in as many channels as the net has, the largest central part of its shape, resized (bicubic).

        Raises:
            EspalierError: files that cannot be decoded; all are listed.
        """
        import numpy as np

        operations, images = require("PIL.ImageOps", "train"), require("PIL.Image", "train")
        mode = {1: "L", 3: "RGB"}.get(self.channels)
        if mode is None:
            raise EspalierError(f"the net takes images of {self.channels} channels: image files have 1 or 3")
        bad: list[str] = []
        pixels_NCHW = torch.zeros(len(files), self.channels, self.height, self.width, dtype=torch.uint8)
        for index, file in enumerate(files):
            try:
                upright = upright_rgb(read_regular(file))
            except (OSError, ValueError) as error:
                bad.append(f"{file} ({getattr(error, 'strerror', None) or error})")
                continue
            fitted = operations.fit(upright, (self.width, self.height), images.Resampling.BICUBIC).convert(mode)
            pixels_NCHW[index] = torch.from_numpy(np.array(fitted)).view(self.height, self.width, -1).permute(2, 0, 1)
        if bad:
            more = f" and {len(bad) - _LISTED} more" if len(bad) > _LISTED else ""
            raise EspalierError(f"cannot decode {len(bad)} of {len(files)} files: {', '.join(bad[:_LISTED])}{more}")
        return to_unit(pixels_NCHW)
