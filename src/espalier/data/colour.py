"""From the bytes of an image file to upright pixels in 8-bit RGB, as a person sees them, whatever its mode."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

from espalier.errors import require

if TYPE_CHECKING:
    import PIL.Image

# Formats whose Pillow mode "I" (32-bit integers) holds numbers from 0 to 65535.
_SIXTEEN_BITS = ("PNG", "PPM")


def upright_rgb(content: bytes) -> PIL.Image.Image:
    """Return the image that ``content`` encodes, turned as its EXIF orientation says, in RGB with 8 bits a channel.

    16-bit values are rounded to 8 bits (Pillow's own conversion cuts them off at 255, which is white). What is
    transparent shows white. Of an animation it is the first frame.

    Args:
        content: a whole file.

    Raises:
        ValueError: no image that Pillow knows, one that is cut off or damaged, or whose numbers have no known white
            (32-bit integers, floating point).
        MissingExtraError: Pillow is not installed.
    """
    images, operations = require("PIL.Image", "train"), require("PIL.ImageOps", "train")
    try:
        with images.open(io.BytesIO(content)) as opened:
            sixteen = opened.mode.startswith("I;16") or (opened.mode == "I" and opened.format in _SIXTEEN_BITS)
            if opened.mode in ("I", "F") and not sixteen:
                raise ValueError("32-bit pixels have no known white: save it with 8 or 16 bits a channel")
            image = operations.exif_transpose(opened)
            if sixteen:
                values = np.asarray(image).astype(np.uint32)
                image = images.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
            elif image.has_transparency_data:
                above = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
                image = images.alpha_composite(images.new("RGBA", above.size, "white"), above)
            return image.convert("RGB")
    except ValueError:
        raise
    except Exception as error:  # Pillow's readers raise a dozen kinds for damaged files
        raise ValueError("no image that Pillow reads" if isinstance(error, images.UnidentifiedImageError)
                         else " ".join(str(error).split()) or type(error).__name__) from error  # fmt: skip
