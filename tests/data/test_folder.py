"""Folders of images by class: how they are split, decoded and kept, and which damage is named."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from espalier.data import build_source
from espalier.data.encoded import EncodedImages
from espalier.data.folder import read_folder
from espalier.errors import EspalierError, MissingExtraError
from espalier.recipes.base import Recipe


def one_line(caught: pytest.ExceptionInfo[EspalierError]) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("ESPALIER_CACHE", str(place))
    return place


def write_image(file: Path, colour: tuple[int, int, int], size: tuple[int, int] = (8, 8)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(file)


def write_pets(root: Path, count: int = 5) -> None:
    for number in range(count):
        write_image(root / "cat" / f"{number}.png", (200, number, 0))
        write_image(root / "dog" / f"{number}.PNG", (0, number, 100), size=(20, 12))


def test_a_flat_folder_is_split_by_class(tmp_path: Path) -> None:
    write_pets(tmp_path, 10)
    data = read_folder(tmp_path, size=4, test_share=0.3)
    assert data.class_names == ("cat", "dog")
    assert data.test.labels_N.bincount().tolist() == [3, 3]
    assert data.train.labels_N.bincount().tolist() == [7, 7]
    for split in (data.train, data.test):
        assert split.images_NCHW.shape[1:] == (3, 4, 4)
        for image, label in zip(split.images_NCHW, split.labels_N, strict=True):
            assert image[0, 0, 0].item() == (200, 0)[label]
            assert image[2, 3, 3].item() == (0, 100)[label]
    numbers = torch.cat([data.train.images_NCHW, data.test.images_NCHW])[:, 1, 0, 0]
    assert numbers.bincount().tolist() == [2] * 10


def test_a_folder_with_its_own_test_set(tmp_path: Path) -> None:
    write_pets(tmp_path / "train", 3)
    write_image(tmp_path / "test" / "dog" / "a.jpg", (0, 0, 100))
    data = read_folder(tmp_path, size=8)
    assert (len(data.train), len(data.test)) == (6, 1)
    assert data.test.labels_N.tolist() == [1], "labels follow the training classes"
    write_image(tmp_path / "test" / "fox" / "a.jpg", (0, 0, 0))
    with pytest.raises(EspalierError, match="fox") as caught:
        read_folder(tmp_path, size=8)
    assert str(tmp_path / "test" / "fox") in one_line(caught)


def test_images_are_cropped_centrally_and_turned_upright(tmp_path: Path) -> None:
    wide = np.zeros((6, 12, 3), np.uint8)
    wide[:, 3:9] = 255
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.fromarray(wide).save(tmp_path / name / f"{number}.png")
    data = read_folder(tmp_path, size=6, test_share=0.5)
    assert (data.train.images_NCHW == 255).all()
    exif = Image.Exif()
    exif[0x0112] = 3  # Upside down.
    half = np.zeros((8, 8), np.uint8)
    half[:4] = 255
    turned = tmp_path / "turned"
    for name in ("a", "b"):
        (turned / name).mkdir(parents=True)
        for number in range(2):
            Image.fromarray(half).save(turned / name / f"{number}.png", exif=exif)
    data = read_folder(turned, size=8, test_share=0.5)
    assert (data.train.images_NCHW[0, :, 4:] == 255).all()
    assert (data.train.images_NCHW[0, :, :4] == 0).all()


def test_a_new_time_alone_renews_the_cache(tmp_path: Path) -> None:
    files = [tmp_path / name / f"{number}.bmp" for name in ("cat", "dog") for number in range(2)]
    for file in files:
        write_image(file, (1, 1, 1))
    assert read_folder(tmp_path, size=8, test_share=0.5).train.images_NCHW.max() == 1
    length = files[0].stat().st_size
    for file in files:
        write_image(file, (2, 2, 2))
        os.utime(file, ns=(1, 1))
    assert files[0].stat().st_size == length
    assert read_folder(tmp_path, size=8, test_share=0.5).train.images_NCHW.min() == 2


def test_without_pillow_no_image_is_blamed(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pets(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(MissingExtraError, match="PIL is needed here"):
        read_folder(tmp_path, size=8)
    streamed = Recipe(
        name="r", dataset="folder", data_path=str(tmp_path), data_args={"storage": "stream", "workers": 0}
    )
    with pytest.raises(EspalierError, match=r"^PIL is needed here"):
        build_source(streamed)


def test_the_cache_serves_until_a_file_changes(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pets(tmp_path)
    first = read_folder(tmp_path, size=8)
    assert len(list(cache.glob("*.npy"))) == 2, "one of each split"
    decoded = []
    decode = EncodedImages.decode
    note = lambda self, index, content: decoded.append(index) or decode(self, index, content)  # noqa: E731
    monkeypatch.setattr(EncodedImages, "decode", note)
    again = read_folder(tmp_path, size=8)
    assert not decoded
    assert torch.equal(first.train.images_NCHW, again.train.images_NCHW)
    assert torch.equal(first.test.labels_N, again.test.labels_N)
    write_image(tmp_path / "cat" / "0.png", (9, 9, 9))
    os.utime(tmp_path / "cat" / "0.png", ns=(1, 1))
    changed = read_folder(tmp_path, size=8)
    assert len(decoded) in (2, 8), "the split with the changed file alone"
    assert (torch.cat([changed.train.images_NCHW, changed.test.images_NCHW]) == 9).flatten(1).all(1).sum() == 1
    read_folder(tmp_path, size=4)
    assert len(list(cache.glob("*.npy"))) == 5, "the changed split, and both at the other size"
    # A damaged cache is decoded anew.
    for file in cache.glob("*.npy"):
        file.write_bytes(b"damaged")
    decoded.clear()
    mended = read_folder(tmp_path, size=8)
    assert len(decoded) == 10
    assert torch.equal(mended.train.images_NCHW, changed.train.images_NCHW)


@pytest.mark.parametrize("damage", ["text", "truncated", "empty"])
def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path, cache: Path, damage: str) -> None:
    write_pets(tmp_path)
    broken = tmp_path / "dog" / "2.PNG"
    noise = np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8)
    Image.fromarray(noise).save(broken)
    content = broken.read_bytes()
    broken.write_bytes({"text": b"no image", "truncated": content[: len(content) // 2], "empty": b""}[damage])
    with pytest.raises(EspalierError) as caught:
        read_folder(tmp_path, size=8)
    assert str(broken) in one_line(caught)
    assert not [file for file in cache.iterdir() if file.suffix != ".lock"], "nothing half-written"
    assert threading.active_count() < 20


def test_a_cache_without_room_leaves_nothing_behind(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pets(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(EspalierError, match=r"No space left on device.*ESPALIER_CACHE") as caught:
        read_folder(tmp_path, size=8)
    assert str(cache) in one_line(caught)
    assert not [file for file in cache.iterdir() if file.suffix != ".lock"]


def test_a_pipe_that_takes_the_place_of_an_image_is_refused(tmp_path: Path) -> None:
    images = EncodedImages.from_names(tmp_path, ["pipe.png"], [0])
    os.mkfifo(tmp_path / "pipe.png")
    writer = os.open(tmp_path / "pipe.png", os.O_RDWR)
    try:
        os.write(writer, b"no image")
        for read in (lambda: images.read(0), lambda: images.fingerprint(8)):
            with pytest.raises(EspalierError, match="not a regular file") as caught:
                read()
            assert str(tmp_path / "pipe.png") in one_line(caught)
    finally:
        os.close(writer)


def test_folders_without_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(EspalierError, match="is not a folder"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(EspalierError, match="has no subfolder"):
        read_folder(tmp_path)
    write_image(tmp_path / "dog" / "0.png", (0, 0, 0))
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("x")
    with pytest.raises(EspalierError, match="holds no image") as caught:
        read_folder(tmp_path)
    assert str(tmp_path / "cat") in one_line(caught)
    write_image(tmp_path / "cat" / "0.png", (0, 0, 0))
    with pytest.raises(EspalierError, match="leaves an empty set"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("workers", 10**12, "workers is 1000000000000: give at most 1024"), ("size", 10**17, "give at most 65536 pixels")],
)
def test_counts_that_no_machine_has_are_refused_before_anything_is_begun(
    name: str, value: int, words: str, tmp_path: Path
) -> None:
    write_pets(tmp_path)
    arguments = {"size": 4, "storage": "stream", name: value}
    recipe = Recipe(name="r", dataset="folder", data_path=str(tmp_path), data_args=arguments)
    with pytest.raises(EspalierError) as caught:
        build_source(recipe)
    assert words in one_line(caught)
