"""From the bytes of an image file to pixels: upright, in 8-bit RGB, squared or a rectangle cut out at random."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from espalier.errors import require, told

if TYPE_CHECKING:
    import PIL.Image

# Formats that Pillow reads with more than 8 bits a grey value: into numbers from 0 (black) to 65535 (white) whatever
# their own depth is, some into 32-bit integers (mode "I"). Those of a TIFF are left as they lie in the file.
_SIXTEEN_BITS = ("JPEG2000", "PNG", "PPM")
_BITS, _ZERO_IS, _SIGN = 258, 262, 339  # TIFF's BitsPerSample, PhotometricInterpretation and SampleFormat


def upright_rgb(content: bytes) -> PIL.Image.Image:
    """Return the image that ``content`` encodes, turned as its EXIF orientation says, in RGB with 8 bits a channel.

    Values of more than 8 bits are rounded to 8 (Pillow's own conversion cuts them off at 255, which is white), from the
    white that the file's header states. What is transparent shows white. Of an animation it is the first frame.

    Args:
        content: a whole file.

    Raises:
        ValueError: no image that Pillow knows, one that is cut off or damaged, or whose numbers have no known black and
            white (32-bit integers, floating point, signed, or a TIFF that does not state which of them zero is).
        MissingExtraError: Pillow is not installed.
    """
    images, operations = require("PIL.Image", "train"), require("PIL.ImageOps", "train")
    try:
        with images.open(io.BytesIO(content)) as opened:
            scale = _grey_scale(opened)
            image = operations.exif_transpose(opened)
            if scale is not None:
                most, inverted = scale
                values = np.asarray(image).astype(np.uint32)
                if inverted:
                    values = most - values
                if isinstance(clear := opened.info.get("transparency"), int):
                    values[values == clear] = most
                image = images.fromarray(((values * 255 + most // 2) // most).astype(np.uint8))
            elif image.has_transparency_data:
                above = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
                image = images.alpha_composite(images.new("RGBA", above.size, "white"), above)
            return image.convert("RGB")
    except ValueError:
        raise
    except Exception as error:  # Pillow's readers raise a dozen kinds for damaged files
        unknown = isinstance(error, images.UnidentifiedImageError)
        raise ValueError("no image that Pillow reads" if unknown else told(error)) from error


def _grey_scale(opened: PIL.Image.Image) -> tuple[int, bool] | None:
    """Return the highest grey value and whether it is black, for an image of more than 8 bits; None for any other.

    Raises:
        ValueError: the file does not say which numbers are black and white.
    """
    deep = opened.mode in ("I", "F") or opened.mode.startswith("I;16")
    if not deep and opened.mode not in ("1", "L"):
        return None
    bits, signed, inverted = 16, False, False
    if opened.format == "TIFF":
        tags: Any = opened.tag_v2  # type: ignore[attr-defined]
        if _ZERO_IS not in tags:
            raise ValueError("the file does not say whether zero is black or white: save it anew")
        bits, signed, inverted = tags.get(_BITS, (1,))[0], tags.get(_SIGN, (1,))[0] != 1, tags[_ZERO_IS] == 0
    elif deep and opened.format not in _SIXTEEN_BITS:
        bits = 32
    if signed or bits > 16 or opened.mode == "F":
        raise ValueError("signed or 32-bit pixels have no known white: save it with 8 or 16 bits a channel")
    return (2**bits - 1, inverted) if deep else None  # Pillow itself heeds the header of fewer bits


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
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _bicubic() -> Any:
    return require("PIL.Image", "train").Resampling.BICUBIC
