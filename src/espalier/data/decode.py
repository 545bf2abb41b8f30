"""From an image of any size to pixels of one: squared, or a rectangle cut out at random."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from espalier.errors import require

if TYPE_CHECKING:
    import PIL.Image


def central_square(image: PIL.Image.Image, size: int) -> Tensor:
    """Return the largest central square of ``image``, resized (bicubic, antialiased) to uint8 ``(3, size, size)``."""
    operations = require("PIL.ImageOps", "train")
    return _to_tensor(operations.fit(image, (size, size), _bicubic()))


def random_area(
    image: PIL.Image.Image,
    size: int,
    scale: tuple[float, float],
    *,
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    generator: torch.Generator,
) -> Tensor:
    """Return a random rectangle of ``image``, resized (bicubic, antialiased) to uint8 ``(3, size, size)``.

    Its area is a uniform share of the image's from ``scale``, width over height log-uniform from ``ratio``, its place
    uniform; a side that would leave the image is cut to it. Source: Szegedy et al. 2014, arXiv 1409.4842.

    Args:
        image: an RGB image of any size.
        size: side of the result in pixels.
        scale: smallest and largest share of the area, within (0, 1].
        ratio: smallest and largest width over height.
        generator: source of the four draws, on the CPU.
    """
    area, shape, x, y = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    pixels = (scale[0] + (scale[1] - scale[0]) * area) * image.width * image.height
    stretch = math.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * shape)
    width = min(math.sqrt(pixels * stretch), image.width)
    height = min(math.sqrt(pixels / stretch), image.height)
    left, top = x * (image.width - width), y * (image.height - height)
    return _to_tensor(image.resize((size, size), _bicubic(), box=(left, top, left + width, top + height)))


def _to_tensor(image: PIL.Image.Image) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _bicubic() -> Any:
    return require("PIL.Image", "train").Resampling.BICUBIC
