"""Crops as an image is decoded: areas at random, and the central square."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from espalier.data.decode import central_square, random_area, upright_rgb


def test_random_areas_have_the_stated_distribution() -> None:
    # A picture whose red is its column and whose green is its row tells where a crop came from.
    rows, columns = np.mgrid[0:200, 0:100]
    pixels = np.stack([columns, rows, np.zeros_like(rows)], -1).astype(np.uint8)
    picture = Image.fromarray(pixels)
    generator = torch.Generator().manual_seed(0)
    areas, ratios, left = [], [], []
    for _ in range(300):
        crop = random_area(picture, 10, (0.1, 0.4), generator=generator).double()
        # Centres of the first and the last of ten pixels lie 9/10 of the side apart.
        width, height = ((crop[channel].max() - crop[channel].min()).item() / 0.9 for channel in (0, 1))
        areas.append(width * height / 20_000)
        ratios.append(width / height)
        left.append(crop[0].min().item())
    assert 0.08 < min(areas) < 0.12
    assert 0.37 < max(areas) < 0.43
    assert np.mean(areas) == pytest.approx(0.25, abs=0.02)
    assert 0.7 < min(ratios) < 0.8
    assert 1.25 < max(ratios) < 1.42
    assert min(left) < 4
    assert random_area(picture, 10, (1.0, 1.0), ratio=(0.5, 0.5), generator=generator).equal(
        torch.from_numpy(np.array(picture.resize((10, 10), Image.Resampling.BICUBIC))).permute(2, 0, 1)
    )
    assert central_square(picture, 10)[1].min() > 45, "the central square of a tall picture"


def test_the_transparent_grey_of_sixteen_bits_shows_white_too() -> None:
    values = np.array([[1000, 40000], [1001, 1000]], np.uint16)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG", transparency=1000)
    shown = np.asarray(upright_rgb(file.getvalue()))
    assert shown[..., 0].tolist() == [[255, 156], [4, 255]]  # round(v·255/65535) beside it
    assert (shown == shown[..., :1]).all()
