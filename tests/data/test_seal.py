"""What is decoded or measured once is trusted later only if it is still what it was, and was made of the same files."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from espalier.data import build_source, encoded
from espalier.data.decoded import map_images
from espalier.data.encoded import EncodedImages
from espalier.data.folder import STORAGES
from espalier.errors import EspalierError
from espalier.files import write_sealed
from espalier.recipes.base import Recipe

SIDE, COUNT = 80, 6
OLD = (10**18, 10**18)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("ESPALIER_CACHE", str(place))
    return place


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Return a folder of uncompressed images, all of one size and one time, as an archive may leave them."""
    for name, level in (("cat", 0), ("dog", 150)):
        (tmp_path / name).mkdir()
        for number in range(COUNT):
            write_image(tmp_path / name / f"{number}.bmp", np.full((SIDE, SIDE, 3), level + number, np.uint8))
    return tmp_path


def write_image(file: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(file)
    os.utime(file, ns=OLD)


def source_of(root: Path, storage: str) -> Any:
    map_images.cache_clear()  # as in a new process
    arguments = {"size": SIDE, "storage": storage, "test_share": 0.5} | ({} if storage == "memory" else {"workers": 0})
    return build_source(replace(Recipe(name="test"), dataset="folder", data_path=str(root), data_args=arguments))


def pixels_of(source: Any) -> torch.Tensor:
    """Return all test images and one epoch of training images, as the network sees them."""
    tests = [images for images, _ in source.eval_batches("test", 4)]
    return torch.cat([*tests, source.train_batch(0, 0, 0, COUNT)[0]])


def damage(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize("place", [128, -1, 128 + 3 * SIDE**2 + 7])
def test_damaged_pixels_are_never_trained_on(images: Path, cache: Path, place: int) -> None:
    for storage in ("memory", "mapped"):
        before = source_of(images, storage)
        wanted, digest = pixels_of(before), before.digest
        for file in cache.glob("images-*.npy"):
            damage(file, place)
        if storage == "mapped":  # found when the image is read, and made anew by the next run
            for _ in cache.glob("images-*.npy"):
                with pytest.raises(EspalierError, match="is damaged: run the same command again") as caught:
                    pixels_of(source_of(images, storage))
                assert "\n" not in str(caught.value)
        after = source_of(images, storage)
        assert after.digest == digest
        assert torch.equal(pixels_of(after), wanted)


@pytest.mark.parametrize("storage", ["memory", "mapped"])
def test_a_seal_that_is_lost_or_damaged_is_made_again(images: Path, cache: Path, storage: str) -> None:
    first = source_of(images, storage)
    wanted, digest = pixels_of(first), first.digest
    damages: list[Any] = [
        Path.unlink,
        lambda seal: seal.write_bytes(b""),
        lambda seal: seal.write_bytes(seal.read_bytes()[:-1]),
        *(lambda seal, place=place: damage(seal, place) for place in (0, 33, 33 + 16, -1)),
    ]
    for do in damages:
        seals = list(cache.glob("images-*.seal"))
        assert len(seals) == 2, "one of each split"
        for seal in seals:
            do(seal)
        again = source_of(images, storage)
        assert again.digest == digest
        assert torch.equal(pixels_of(again), wanted)


@pytest.mark.parametrize("storage", ["mapped", "stream"])
def test_damaged_statistics_are_measured_again(images: Path, cache: Path, storage: str) -> None:
    first = source_of(images, storage)
    wanted, digest = pixels_of(first), first.digest
    (file,) = cache.glob("values-*.json")
    sealed = json.loads(file.read_text())
    other = [[0] * 255 + [1]] * 3
    for content in (other, {"counts": other}, {**sealed, "counts": other}, {"digest": sealed["digest"]}, {}):
        file.write_text(json.dumps(content))
        again = source_of(images, storage)
        assert torch.equal(pixels_of(again), wanted)
        assert again.digest == digest
    assert json.loads(file.read_text()) == sealed


def test_what_normalises_is_part_of_the_digest(images: Path, cache: Path) -> None:
    digest = source_of(images, "stream").digest
    (file,) = cache.glob("values-*.json")
    counts = json.loads(file.read_text())["counts"]
    write_sealed(file, {"counts": [counts[0], counts[1], counts[2][::-1]]})  # by another program, with a right seal
    assert source_of(images, "stream").digest != digest


@pytest.mark.parametrize("storage", STORAGES)
def test_images_of_equal_size_and_time_are_not_taken_for_each_other(images: Path, storage: str) -> None:
    before = source_of(images, storage)
    wanted, digest = pixels_of(before), before.digest
    for old, new in (("cat", "held"), ("dog", "cat"), ("held", "dog")):
        (images / old).rename(images / new)
    after = source_of(images, storage)
    assert after.digest != digest
    assert not torch.equal(pixels_of(after), wanted)
    for old, new in (("cat", "held"), ("dog", "cat"), ("held", "dog")):
        (images / old).rename(images / new)
    back = source_of(images, storage)
    assert back.digest == digest
    assert torch.equal(pixels_of(back), wanted)


@pytest.mark.parametrize("storage", ["memory", "mapped"])
def test_a_change_that_the_sample_of_contents_misses_is_found(
    images: Path, storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoded, "_PIECE", 100)
    before = source_of(images, storage)
    wanted, digest = pixels_of(before), before.digest
    for file in images.rglob("*.bmp"):
        pixels = np.array(Image.open(file))
        pixels[SIDE // 4] = 99
        changed = file.stat().st_ctime_ns
        while file.stat().st_ctime_ns == changed:  # the system's clock ticks every few milliseconds
            write_image(file, pixels)
    after = source_of(images, storage)
    assert after.digest != digest
    assert not torch.equal(pixels_of(after), wanted)


@pytest.mark.parametrize("storage", STORAGES)
def test_files_that_are_unpacked_anew_are_the_same_data(
    images: Path, storage: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = source_of(images, storage)
    wanted, digest = pixels_of(before), before.digest
    for file in images.rglob("*.bmp"):
        content, changed = file.read_bytes(), file.stat().st_ctime_ns
        while file.exists() and file.stat().st_ctime_ns == changed:
            file.unlink()
            file.write_bytes(content)
            os.utime(file, ns=OLD)
    if storage != "stream":
        monkeypatch.setattr(EncodedImages, "decode", lambda *_: pytest.fail("an image was decoded"))
    after = source_of(images, storage)
    assert after.digest == digest
    assert torch.equal(pixels_of(after), wanted)
    if storage != "stream":
        monkeypatch.setattr(EncodedImages, "read", lambda *_: pytest.fail("an image was read, though known by now"))
        assert torch.equal(pixels_of(source_of(images, storage)), wanted)
