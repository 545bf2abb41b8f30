"""Read the pictures of a page back: their pixels, compared as far as rounding lets two computations agree."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image


def pixels(address: str) -> np.ndarray:
    """Return the RGBA pixels (H, W, 4) of a picture given as a data address."""
    head, _, content = address.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGBA"))


def assert_same_picture(ours: str, theirs: str) -> None:
    """Assert that two pictures show the same values: rounding may move one to the neighbouring colour."""
    drawn, plain = pixels(ours).astype(int), pixels(theirs).astype(int)
    assert drawn.shape == plain.shape
    assert np.abs(drawn - plain).max() <= 4
