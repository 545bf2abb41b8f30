"""Does the loader keep up with the model? Images a second of both, and whether memory stays flat, on generated JPEGs.

    python benchmarks/loader.py --images 100000 --distinct 2000 --folder DIR [--workers 1 2] [--steps 40] [--device cpu]

Writes ``DIR/train/CLASS/NUMBER.jpg`` (and ``val``) once: JPEGs of ImageNet's sides and bytes (about 500×375 and 110 kB
on average) of coloured 1/f noise. Only ``--distinct`` of them are encoded, the others are hard links: each is listed,
opened, read and decoded as a file of its own, but the disk's cache holds them all, so this measures decoding, not the
disk. The models train on batches that are already in memory; a loader that is faster than its model never shows.
"""

from __future__ import annotations

import argparse
import os
import random
from pathlib import Path

import numpy as np
from PIL import Image

# Sides (width, height) with their shares, roughly as in ImageNet.
SIDES = (((500, 375), 0.6), ((375, 500), 0.16), ((500, 333), 0.16), ((640, 480), 0.05), ((1024, 768), 0.03))


def write_jpegs(folder: Path, images: int, distinct: int, classes: int = 1000, val: int = 2000) -> None:
    """Write ``images`` training and ``val`` validation JPEGs, ``distinct`` of them encoded and the rest hard links."""
    if (folder / "complete").exists():
        return
    pool = folder / "pool"
    pool.mkdir(parents=True, exist_ok=True)
    draws = random.Random(0)
    for number in range(distinct):
        width, height = draws.choices(*zip(*SIDES, strict=True))[0]
        encoded = pool / f"{number}.jpg"
        if not encoded.exists():
            noise_image(width, height, number).save(encoded, quality=88)
    for split, count in (("train", images), ("val", val)):
        for number in range(count):
            place = folder / split / f"n{number % classes:08d}" / f"n{number % classes:08d}_{number}.JPEG"
            if number < classes:
                place.parent.mkdir(parents=True, exist_ok=True)
            if not place.exists():
                os.link(pool / f"{(number * 7919) % distinct}.jpg", place)
    (folder / "complete").touch()


def noise_image(width: int, height: int, seed: int) -> Image.Image:
    """Return coloured noise whose spectrum falls as 1/f, as that of photographs does, with some grain."""
    stream = np.random.default_rng(seed)
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    fall = 1 / np.maximum(np.hypot(rows, columns), 1 / max(width, height))
    white = np.fft.rfft2(stream.standard_normal((3, height, width)))
    smooth = np.fft.irfft2(white * fall, s=(height, width))
    smooth = smooth / smooth.std((1, 2), keepdims=True)
    mixed = np.einsum("cd,dhw->hwc", np.array([[1, 0.3, 0], [1, 0, 0.3], [1, -0.3, -0.3]]), smooth)
    pixels = 118 + 55 * mixed + 9 * stream.standard_normal((height, width, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--distinct", type=int, default=2000)
    arguments = parser.parse_args()
    write_jpegs(arguments.folder, arguments.images, arguments.distinct)
