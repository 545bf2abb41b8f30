"""Streamed images for distributed_runs: each bears its number, and every process notes which ones it was given."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Self

import numpy as np
import standins
import torch
from PIL import Image

from espalier.data import StreamSource
from espalier.data.folder import folder_source
from espalier.recipes import Recipe

TRAIN, TEST, EPOCHS, STEPS = 40, 13, 3, 5


def write_images(folder: Path) -> None:
    """Write noise of four classes, of unequal sides; the red channel of an image is its number."""
    draw = np.random.default_rng(0)
    for number in range(TRAIN + TEST):
        pixels = draw.integers(0, 256, (7 + number % 3, 6 + number % 5, 3), dtype=np.uint8)
        pixels[..., 0], pixels[..., 1] = number, 60 * (number % 4) + 20
        file = folder / ("train" if number < TRAIN else "val") / f"class{number % 4}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)


def recipe(images: Path, workers: int) -> Recipe:
    """Return a run of three epochs of five steps, on crops that differ from epoch to epoch."""
    return standins.recipe(
        dataset="folder", data_path=str(images), normalize="none", crop_scale=(0.3, 1.0), epochs=EPOCHS,
        data_args={"size": 6, "storage": "stream", "workers": workers}, model="blocks", eps=1e-3,
        eval_batch_size=5, batch_size=TRAIN // STEPS,
    )  # fmt: skip


class NotingSource:
    """A streaming source that appends (epoch, step, numbers of the images) to a file, and may signal its process."""

    def __init__(self, recipe: Recipe, notes: Path) -> None:
        source = folder_source(recipe)
        assert isinstance(source, StreamSource)
        self.source, self._notes = source, notes
        self.signal_at: tuple[int, int, int] | None = None

    @property
    def model_args(self) -> dict[str, Any]:
        """All that the stand-in takes."""
        return {"num_classes": self.source.model_args["num_classes"]}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def to(self, device: torch.device | str) -> Self:
        self.source.to(device)
        return self

    def train_batch(self, seed: int, epoch: int, step: int, batch_size: int) -> Any:
        if self.signal_at is not None and (epoch, step) == self.signal_at[:2]:
            os.kill(os.getpid(), self.signal_at[2])
        images, labels = self.source.train_batch(seed, epoch, step, batch_size)
        with self._notes.open("a") as file:
            print(json.dumps([epoch, step, (255 * images[:, 0, 0, 0]).round().int().tolist()]), file=file)
        return images, labels
