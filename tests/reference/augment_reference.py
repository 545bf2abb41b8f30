"""Augmentation one image and one pixel at a time: slow, obvious, and sharing no code with the library."""

from __future__ import annotations

import math

import numpy as np


def crop_reference(image_CHW: np.ndarray, top: int, left: int, padding: int, mode: str) -> np.ndarray:
    """Pad with numpy, then cut the window that starts at (top, left) of the padded image."""
    _, height, width = image_CHW.shape
    pad = ((0, 0), (padding, padding), (padding, padding))
    padded = np.pad(image_CHW, pad, mode="reflect") if mode == "reflect" else np.pad(image_CHW, pad)
    return padded[:, top : top + height, left : left + width]


def resized_window_reference(image_CHW: np.ndarray, top: float, left: float, height: float, width: float) -> np.ndarray:
    """Sample the window (in pixels, edges at integers) bilinearly at the centres of an equally fine grid."""
    channels, rows, columns = image_CHW.shape
    out = np.zeros_like(image_CHW)
    for i in range(rows):
        for j in range(columns):
            y = min(max(top + (i + 0.5) / rows * height - 0.5, 0.0), rows - 1.0)
            x = min(max(left + (j + 0.5) / columns * width - 0.5, 0.0), columns - 1.0)
            y0, x0 = math.floor(y), math.floor(x)
            y1, x1 = min(y0 + 1, rows - 1), min(x0 + 1, columns - 1)
            for c in range(channels):
                upper = image_CHW[c, y0, x0] * (1 - (x - x0)) + image_CHW[c, y0, x1] * (x - x0)
                lower = image_CHW[c, y1, x0] * (1 - (x - x0)) + image_CHW[c, y1, x1] * (x - x0)
                out[c, i, j] = upper * (1 - (y - y0)) + lower * (y - y0)
    return out
