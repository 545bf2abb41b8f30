"""The covariance of depthwise filters, entry by entry from the formulas, in plain Python floats."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor


def plain_covariance(
    sizes: tuple[int, ...],
    sigma: float,
    sigma_is_std: bool = False,
    wrap: bool | None = None,
    mask: str = "x",
    centre: str | tuple[int, ...] = "middle",
    variant: str = "clip",
    scale: str = "raw",
) -> Tensor:
    s = sigma**2 if sigma_is_std else sigma
    if wrap is None:
        wrap = variant != "psd"
    named = tuple(k - 1 if centre == "last" else math.floor(k / 2) for k in sizes)
    c = named if isinstance(centre, str) else centre
    pixels = list(itertools.product(*(range(k) for k in sizes)))

    def z(x: tuple[int, ...]) -> float:
        return math.exp(-sum((a - b) ** 2 for a, b in zip(x, c, strict=True)) / (2 * s))

    def g(x: tuple[int, ...], y: tuple[int, ...]) -> float:
        squared = 0.0
        for a, b, k in zip(x, y, sizes, strict=True):
            # The nearest of the copies of b on the torus.
            squared += min((a - b - k * turn) ** 2 for turn in ((-1, 0, 1) if wrap else (0,)))
        return math.exp(-squared / (2 * s))

    raw = torch.zeros(len(pixels), len(pixels), dtype=torch.float64)
    for i, x in enumerate(pixels):
        for j, y in enumerate(pixels):
            if variant == "psd":
                raw[i, j] = math.sqrt(z(x) * z(y)) * (g(x, y) - math.sqrt(z(x) * z(y)) / 2)
            else:
                hat_xy = (z(x) if mask == "x" else z(y)) * (g(x, y) - z(y) / 2)
                hat_yx = (z(y) if mask == "x" else z(x)) * (g(y, x) - z(x) / 2)
                raw[i, j] = (hat_xy + hat_yx) / 2
    if variant != "psd":
        # The projection on positive matrices is (A + |A|)/2 with |A| = (AᵀA)^½, whose root the singular vectors give.
        _, singular, vh = torch.linalg.svd(raw)
        absolute = sum(value * torch.outer(v, v) for value, v in zip(singular, vh, strict=True))
        raw = (raw + absolute) / 2 if variant == "clip" else absolute
    energy = sum(float(raw[i, i]) for i in range(len(pixels)))
    return raw if scale == "raw" else raw / energy if scale == "unit" else raw / energy / 3
