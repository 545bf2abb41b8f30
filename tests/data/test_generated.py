"""Generated images in a training set: what every batch is made of, and which files are refused."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from espalier.data import ImageSource, build_source
from espalier.data.generated import GeneratedImages, read_generated
from espalier.data.labelled import ImageData, LabelledImages
from espalier.errors import EspalierError
from espalier.recipes import get_recipe
from needs import needs_data

REAL = LabelledImages(torch.arange(40, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4), torch.arange(40) % 3)


def write(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def samples(count: int = 30) -> dict[str, Any]:
    """Return images as files of samples hold them: image i is filled with 100 + i, and of class i % 3."""
    pixels = np.arange(100, 100 + count, dtype=np.uint8).reshape(-1, 1, 1, 1)
    return {"image": np.tile(pixels, (1, 4, 4, 3)), "label": np.arange(count) % 3}


def values(images: torch.Tensor) -> list[int]:
    return (images[:, 0, 0, 0] * 255).round().long().tolist()


@given(batch=st.integers(2, 20), share=st.floats(0.05, 0.95), count=st.integers(1, 50), seed=st.integers(0, 9))
def test_every_batch_has_the_share_and_both_kinds_are_shown_evenly(
    batch: int, share: float, count: int, seed: int
) -> None:
    arrays = samples(count)
    images = LabelledImages(
        torch.from_numpy(arrays["image"]).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(arrays["label"])
    )
    source = ImageSource(ImageData(REAL, REAL, ("a", "b", "c")), None, "none", GeneratedImages(images, share))
    wanted = round(share * batch)
    if not 0 < wanted < batch:
        with pytest.raises(EspalierError, match=f"batch_size {batch}"):
            source.train_batch(seed, 0, 0, batch)
        return
    steps, real, drawn = source.steps_per_epoch(batch), [], []
    assert steps == 40 // batch
    for step in range(steps):
        pixels, labels = source.train_batch(seed, 1, step, batch)
        again, _ = source.train_batch(seed, 1, step, batch)
        assert torch.equal(pixels, again)
        shown = values(pixels)
        assert labels.tolist() == [value % 3 if value < 100 else (value - 100) % 3 for value in shown]
        assert sum(value >= 100 for value in shown) == wanted
        real += [value for value in shown if value < 100]
        drawn += [value for value in shown if value >= 100]
    assert len(real) == len(set(real))
    shown_by_image = [drawn.count(100 + index) for index in range(count)]
    assert max(shown_by_image) - min(shown_by_image) <= 1


@pytest.mark.parametrize("layout", ["last", "first"])
def test_both_layouts_are_read(tmp_path: Path, layout: str) -> None:
    arrays = samples()
    pixels = arrays["image"] if layout == "last" else arrays["image"].transpose(0, 3, 1, 2)
    path = write(tmp_path / "g.npz", image=pixels, label=arrays["label"].reshape(-1, 1))
    found = read_generated({"generated": str(path), "generated_share": None}, REAL, 3)
    assert found is not None
    assert found.count(10) == 7
    assert found.images.images_NCHW.shape == (30, 3, 4, 4)
    assert found.images.images_NCHW[:, 2, 3, 1].tolist() == list(range(100, 130))
    assert found.images.labels_N.tolist() == [index % 3 for index in range(30)]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "other size": ({"image": np.zeros((2, 5, 5, 3), np.uint8), "label": [0, 1]}, "give uint8 pixels"),
    "floats": ({"image": np.zeros((2, 4, 4, 3), np.float32), "label": [0, 1]}, "give uint8 pixels"),
    "fewer labels": ({"image": np.zeros((2, 4, 4, 3), np.uint8), "label": [0]}, "give uint8 pixels"),
    "none": ({"image": np.zeros((0, 4, 4, 3), np.uint8), "label": np.zeros(0, int)}, "holds no images"),
    "no labels": ({"image": np.zeros((2, 4, 4, 3), np.uint8)}, "called image and label"),
    "a class too many": ({"image": np.zeros((2, 4, 4, 3), np.uint8), "label": [0, 3]}, "from 0 to 2"),
    "negative": ({"image": np.zeros((2, 4, 4, 3), np.uint8), "label": [0, -1]}, "from 0 to 2"),
    "probabilities": ({"image": np.zeros((2, 4, 4, 3), np.uint8), "label": [0.0, 1.0]}, "from 0 to 2"),
    "objects": ({"image": np.array([None, 1], object), "label": [0, 1]}, "no whole .npz archive"),
    "scalars": ({"image": np.uint8(1), "label": 1}, "give uint8 pixels"),
}


@pytest.mark.parametrize("name", BAD)
def test_other_files_are_refused(tmp_path: Path, name: str) -> None:
    arrays, words = BAD[name]
    path = write(tmp_path / "g.npz", **arrays)
    with pytest.raises(EspalierError, match=words) as caught:
        read_generated({"generated": str(path), "generated_share": 0.5}, REAL, 3)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_header_that_claims_terabytes_is_refused(tmp_path: Path) -> None:
    header = io.BytesIO()
    shape = {"descr": "|u1", "fortran_order": False, "shape": (2**40, 4, 4, 3)}
    np.lib.format.write_array_header_1_0(header, shape)
    with zipfile.ZipFile(tmp_path / "g.npz", "w") as archive:
        archive.writestr("image.npy", header.getvalue() + bytes(96))
        archive.writestr("label.npy", header.getvalue())
    with pytest.raises(EspalierError, match="no whole"):
        read_generated({"generated": str(tmp_path / "g.npz"), "generated_share": 0.5}, REAL, 3)


def test_a_member_that_does_not_begin_as_an_array_is_refused(tmp_path: Path) -> None:
    """Numpy returns its bytes."""
    with zipfile.ZipFile(write(tmp_path / "g.npz", image=samples()["image"]), "a") as archive:
        archive.writestr("label.npy", b"no array" * 5)
    with pytest.raises(EspalierError, match="no whole"):
        read_generated({"generated": str(tmp_path / "g.npz"), "generated_share": 0.5}, REAL, 3)


def test_an_archive_that_unpacks_beyond_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("espalier.data.generated.free_memory", lambda: 1000.0)
    np.savez_compressed(tmp_path / "g.npz", **samples())
    with pytest.raises(EspalierError, match="of memory are free"):
        read_generated({"generated": str(tmp_path / "g.npz"), "generated_share": 0.5}, REAL, 3)


@pytest.mark.parametrize("share", [0, 1, -0.5, True, "half", float("nan")])
def test_a_share_out_of_range_is_refused(tmp_path: Path, share: Any) -> None:
    path = write(tmp_path / "g.npz", **samples())
    with pytest.raises(EspalierError, match="generated_share is"):
        read_generated({"generated": str(path), "generated_share": share}, REAL, 3)


def test_a_share_without_a_file_is_refused_and_a_missing_file_named(tmp_path: Path) -> None:
    with pytest.raises(EspalierError, match="without a file"):
        read_generated({"generated": None, "generated_share": 0.5}, REAL, 3)
    with pytest.raises(EspalierError, match=r"absent\.npz, which cannot be read"):
        read_generated({"generated": str(tmp_path / "absent.npz"), "generated_share": 0.5}, REAL, 3)


@needs_data("fashion-mnist")
def test_a_recipe_names_them_and_the_digest_holds_them(tmp_path: Path) -> None:
    from dataclasses import replace

    pixels = np.full((20, 28, 28, 1), 255, np.uint8)
    path = write(tmp_path / "g.npz", image=pixels, label=np.arange(20) % 10)
    base = replace(get_recipe("orthogonal_fashion"), data_args={"train_limit": 100}, batch_size=10)
    mixed = replace(base, data_args={"train_limit": 100, "generated": str(path), "generated_share": 0.3})
    source = build_source(mixed)
    images, labels = source.train_batch(0, 0, 0, 10)
    assert images.shape == (10, 1, 28, 28)
    assert labels.shape == (10,)
    digest = source.digest  # type: ignore[attr-defined]
    assert digest != build_source(base).digest  # type: ignore[attr-defined]
    with pytest.raises(EspalierError, match="batch_size 1"):
        build_source(replace(mixed, batch_size=1))
    write(path, image=pixels, label=np.arange(20) % 9)
    assert digest != build_source(mixed).digest  # type: ignore[attr-defined]
