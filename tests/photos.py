"""A folder of small photographs of three classes that a net can tell apart, and runs on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"apple": (200, 30, 20), "leaf": (30, 180, 40), "sky": (60, 90, 220)}
TINY = [
    "--epochs", "2", "--batch-size", "8", "--threads", "1", "--data-args.size", "16", "--model-args.patch-size", "4",
    "--model-args.embed-dim", "24", "--model-args.depth", "2",
]  # fmt: skip


def write_photos(root: Path, count: int = 10) -> list[Path]:
    """Write ``count`` noisy pictures a class below ``root``, of unequal shapes, and return their files."""
    rng = np.random.default_rng(0)
    files = []
    for name, colour in COLOURS.items():
        for number in range(count):
            noise = rng.normal(scale=30, size=(20 + number, 24, 3))
            file = root / name / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(file)
            files.append(file)
    return files
