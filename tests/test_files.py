"""Readers against fabricated files, damaged ones, and the real data sets where they are at hand."""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import os
import pickle
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from espalier.data.labelled import ImageData, LabelledImages, stratified_order
from espalier.data.published import (
    CIFAR10_MD5,
    FASHION_MNIST_MD5,
    parse_idx,
    read_cifar10,
    read_digits,
    read_fashion_mnist,
)
from espalier.data.text import read_text
from espalier.errors import EspalierError, shown
from espalier.files import (
    read_checked,
    read_object,
    read_regular,
    read_sealed,
    write_bytes,
)
from needs import data_folder, needs_data


def one_line(caught: pytest.ExceptionInfo[EspalierError]) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


# CIFAR-10


def write_cifar(folder: Path, per_batch: int = 3) -> dict[str, str]:
    """Write small pickles of the official shape and return their md5s."""
    md5 = {}
    rng = np.random.default_rng(0)
    for name in CIFAR10_MD5:
        labels = rng.integers(0, 10, per_batch).tolist()
        batch = {b"data": rng.integers(0, 256, (per_batch, 3072), dtype=np.uint8), b"labels": labels}
        content = pickle.dumps(batch, protocol=2)
        (folder / name).write_bytes(content)
        md5[name] = hashlib.md5(content).hexdigest()
    return md5


@pytest.mark.parametrize("nested", [False, True])
def test_cifar_batches_are_read_in_order(tmp_path: Path, nested: bool) -> None:
    folder = tmp_path / "cifar-10-batches-py" if nested else tmp_path
    folder.mkdir(exist_ok=True)
    data = read_cifar10(tmp_path, write_cifar(folder))
    assert data.train.images_NCHW.shape == (15, 3, 32, 32)
    assert len(data.test) == 3
    for number in range(1, 6):
        batch = pickle.loads((folder / f"data_batch_{number}").read_bytes(), encoding="bytes")
        for row in range(3):
            image = data.train.images_NCHW[3 * (number - 1) + row]
            # The official layout: 1,024 red values row by row, then green, then blue.
            assert image[1, 2, 5].item() == batch[b"data"][row][1024 + 2 * 32 + 5]
            assert data.train.labels_N[3 * (number - 1) + row].item() == batch[b"labels"][row]


class Bomb:
    """A pickle that leaves a file behind when it is opened."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.flag),)


def test_a_foreign_pickle_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    flag = tmp_path / "exploded"
    for name in CIFAR10_MD5:
        (tmp_path / name).write_bytes(pickle.dumps(Bomb(flag)))
    with pytest.raises(EspalierError, match="md5") as caught:
        read_cifar10(tmp_path)
    assert str(tmp_path / "data_batch_1") in one_line(caught)
    assert not flag.exists()
    # The bomb is live: opening it does set the flag.
    pickle.loads((tmp_path / "data_batch_1").read_bytes())
    assert flag.exists()


def test_one_flipped_bit_in_any_cifar_file_is_found(tmp_path: Path) -> None:
    md5 = write_cifar(tmp_path)
    for name in md5:
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:-50] + bytes([content[-50] ^ 1]) + content[-49:])
        with pytest.raises(EspalierError) as caught:
            read_cifar10(tmp_path, md5)
        assert str(tmp_path / name) in one_line(caught)
        (tmp_path / name).write_bytes(content)


def test_a_missing_cifar_file_is_named(tmp_path: Path) -> None:
    md5 = write_cifar(tmp_path)
    (tmp_path / "test_batch").unlink()
    with pytest.raises(EspalierError, match="--data") as caught:
        read_cifar10(tmp_path, md5)
    assert str(tmp_path / "test_batch") in one_line(caught)


@needs_data("cifar10")
def test_the_real_cifar10() -> None:
    data = read_cifar10(data_folder("cifar10"))
    assert data.train.images_NCHW.shape == (50000, 3, 32, 32)
    assert data.train.labels_N.bincount().tolist() == [5000] * 10
    assert data.test.labels_N.bincount().tolist() == [1000] * 10
    # The first training image is a frog; the first test image a cat.
    assert data.class_names[data.train.labels_N[0]] == "frog"
    assert data.class_names[data.test.labels_N[0]] == "cat"


# IDX


def idx_bytes(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_fashion(folder: Path) -> dict[str, str]:
    rng = np.random.default_rng(0)
    md5 = {}
    for name in FASHION_MNIST_MD5:
        count = 6 if name.startswith("train") else 4
        shape = (count, 28, 28) if "images" in name else (count,)
        # No class is tested that has no training images.
        content = gzip.compress(idx_bytes(rng.integers(0, 10, shape) if "images" in name else np.arange(count)))
        (folder / name).write_bytes(content)
        md5[name] = hashlib.md5(content).hexdigest()
    return md5


def test_idx_keeps_shape_and_values() -> None:
    array = np.random.default_rng(0).integers(0, 256, (3, 4, 5))
    assert np.array_equal(parse_idx(gzip.compress(idx_bytes(array)), Path("x")).numpy(), array)


def test_fashion_mnist_files_go_where_they_belong(tmp_path: Path) -> None:
    data = read_fashion_mnist(tmp_path, write_fashion(tmp_path))
    assert data.train.images_NCHW.shape == (6, 1, 28, 28)
    assert data.test.images_NCHW.shape == (4, 1, 28, 28)
    raw = gzip.decompress((tmp_path / "t10k-labels-idx1-ubyte.gz").read_bytes())
    assert data.test.labels_N.tolist() == list(raw[8:])


@pytest.mark.parametrize("keep", [0, 3, 4, 9, 15, 16, 20, 75])
def test_every_truncation_of_an_idx_is_found(keep: int) -> None:
    whole = idx_bytes(np.ones((3, 4, 5)))
    assert len(whole) == 76
    with pytest.raises(EspalierError) as caught:
        parse_idx(gzip.compress(whole[:keep]), Path("some/file.gz"))
    assert "some/file.gz" in one_line(caught)


@pytest.mark.parametrize("keep", [0, 1, 10, 25])
def test_every_truncation_of_the_gzip_is_found(keep: int) -> None:
    whole = gzip.compress(idx_bytes(np.random.default_rng(0).integers(0, 256, (3, 4, 5))))
    with pytest.raises(EspalierError) as caught:
        parse_idx(whole[:keep], Path("some/file.gz"))
    assert "some/file.gz" in one_line(caught)


def test_idx_of_another_type_or_with_too_much_is_refused() -> None:
    whole = idx_bytes(np.ones((2, 2)))
    for content in (whole + b"\0", b"\0\0\x0d" + whole[3:], b"\x1f\x8b" + whole[2:]):
        with pytest.raises(EspalierError):
            parse_idx(gzip.compress(content), Path("x"))
    with pytest.raises(EspalierError, match="gzip"):
        parse_idx(whole, Path("x"))


def test_a_foreign_fashion_mnist_is_refused(tmp_path: Path) -> None:
    write_fashion(tmp_path)
    with pytest.raises(EspalierError, match="md5") as caught:
        read_fashion_mnist(tmp_path)
    assert str(tmp_path / "train-images-idx3-ubyte.gz") in one_line(caught)


@needs_data("fashion-mnist")
def test_the_real_fashion_mnist() -> None:
    data = read_fashion_mnist(data_folder("fashion-mnist"))
    assert data.train.images_NCHW.shape == (60000, 1, 28, 28)
    assert data.train.labels_N.bincount().tolist() == [6000] * 10
    assert data.test.labels_N.bincount().tolist() == [1000] * 10
    assert data.class_names[data.train.labels_N[0]] == "Ankle boot"


# Digits, splits and limits


def test_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    bundled = load_digits()
    data = read_digits()
    assert (len(data.train), len(data.test)) == (1437, 360)
    both = torch.cat([data.train.images_NCHW, data.test.images_NCHW]).squeeze(1).numpy()
    labels = torch.cat([data.train.labels_N, data.test.labels_N]).numpy()
    found = {
        (np.rint(image * (16 / 255)).astype(int).tobytes(), label) for image, label in zip(both, labels, strict=True)
    }
    expected = {(i.astype(int).tobytes(), t) for i, t in zip(bundled.images, bundled.target, strict=True)}
    assert found == expected
    assert len(found) == 1797


def test_digits_split_is_stratified_and_never_moves() -> None:
    data = read_digits()
    whole = (data.train.labels_N.bincount() + data.test.labels_N.bincount()).double()
    assert (data.test.labels_N.bincount() - whole * 360 / 1797).abs().max() <= 1
    content = data.test.images_NCHW.numpy().tobytes() + data.test.labels_N.numpy().tobytes()
    # A torch that permutes differently would silently change every published score: fail here instead.
    assert hashlib.sha256(content).hexdigest()[:16] == "28fea09279b2bbfd"


@pytest.mark.parametrize("counts", [[100, 100, 100], [10, 200, 57], [1, 1, 500]])
def test_every_prefix_of_the_stratified_order_has_the_shares_of_the_whole(counts: list[int]) -> None:
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    order = stratified_order(labels, "test")
    assert order.sort().values.equal(torch.arange(len(labels)))
    shares = torch.tensor(counts) / len(labels)
    for length in range(1, len(labels) + 1):
        found = labels[order[:length]].bincount(minlength=3)
        assert (found - shares * length).abs().max() <= 1.5
    assert torch.equal(order, stratified_order(labels, "test"))
    assert not torch.equal(order, stratified_order(labels, "other"))


def test_limits_are_balanced_nested_and_checked() -> None:
    labels = torch.arange(1000) % 10
    split = LabelledImages(torch.arange(1000).to(torch.uint8).view(-1, 1, 1, 1), labels)
    data = ImageData(split, split.take(torch.arange(100)), tuple("0123456789"))
    small, large = data.limited(30), data.limited(200)
    assert small.train.labels_N.bincount().tolist() == [3] * 10
    assert torch.equal(small.train.images_NCHW, large.train.images_NCHW[:30])
    assert len(small.test) == 100
    assert len(data.limited(test_limit=7).test) == 7
    for wrong in (0, -3, 1.5, "9", True):
        with pytest.raises(EspalierError, match=r"train_limit is .*give a whole number"):
            data.limited(train_limit=wrong)
    with pytest.raises(EspalierError, match="test_limit is 101, and there are 100 images"):
        data.limited(test_limit=101)


# Files of our own


def test_a_file_that_cannot_be_written_is_told_by_the_name_that_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 250)  # a name too long once it is a temporary one
    with pytest.raises(OSError) as caught:
        write_bytes(path, b"content")
    assert caught.value.filename == str(path)
    with pytest.raises(EspalierError, match="is a folder") as refused:
        write_bytes(tmp_path, b"content")
    assert str(tmp_path) in one_line(refused)
    with pytest.raises(EspalierError, match="does not exist"):
        write_bytes(tmp_path / "nowhere" / "file", b"content")
    assert not [left for place in (tmp_path, tmp_path.parent) for left in place.glob(".*.partial")]


def test_what_is_written_through_links_is_the_file_that_they_lead_to(tmp_path: Path) -> None:
    real, hop, link, elsewhere = (tmp_path / name for name in ("a/real", "b/hop", "c/link", "d/not yet"))
    for path in (real, hop, link, elsewhere):
        path.parent.mkdir()
    real.write_bytes(b"before")
    hop.symlink_to("../a/real")
    link.symlink_to(hop)
    (tmp_path / "c" / "first").symlink_to(elsewhere)
    for path in (link, tmp_path / "c" / "first"):
        write_bytes(path, b"after")
        assert path.is_symlink()
        assert path.read_bytes() == b"after"
    assert hop.is_symlink()
    assert not real.is_symlink()
    assert not elsewhere.is_symlink()
    assert len([path for path in tmp_path.rglob("*") if not path.is_dir()]) == 5, "nothing is left over"


def test_what_is_no_regular_file_is_not_replaced(tmp_path: Path) -> None:
    places = [tmp_path / "pipe", tmp_path / "socket"]
    os.mkfifo(places[0])
    os.mknod(places[1], stat.S_IFSOCK | 0o600)
    with contextlib.suppress(PermissionError):  # root alone may
        os.mknod(tmp_path / "device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        places.append(tmp_path / "device")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    kinds = {path: path.stat().st_mode for path in places}
    for path in (*places, tmp_path / "link"):
        with pytest.raises(EspalierError, match="a pipe, device or socket") as caught:
            write_bytes(path, b"content")
        assert str(path) in one_line(caught)
    assert {path: path.stat().st_mode for path in places} == kinds
    assert (tmp_path / "link").is_symlink()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OSError) as looped:
        write_bytes(tmp_path / "loop", b"content")
    assert looped.value.errno == errno.ELOOP
    assert {path.name for path in tmp_path.iterdir()} == {"link", "loop", *(path.name for path in places)}


@contextlib.contextmanager
def pipe(path: Path, content: bytes) -> Iterator[Path]:
    """Make a pipe whose reader gets ``content``, as long as the block lasts."""
    os.mkfifo(path)

    def serve() -> None:
        with contextlib.suppress(OSError), path.open("wb") as file:
            file.write(content)

    writer = threading.Thread(target=serve, daemon=True)
    writer.start()
    try:
        yield path
    finally:
        while writer.is_alive():
            os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))  # lets the writer go on that nobody has read from
            writer.join(0.01)


@pytest.mark.parametrize(
    "read",
    [
        read_object,
        lambda path: read_sealed(path, "study"),
        lambda path: read_checked(path, hashlib.md5(b"{}").hexdigest()),
        read_text,
        read_regular,
    ],
)
def test_a_pipe_is_refused_where_a_file_is_read(tmp_path: Path, read: Callable[[Path], object]) -> None:
    with pipe(tmp_path / "pipe", b"{}") as path, pytest.raises((EspalierError, OSError), match="not a regular file"):
        read(path)
    (tmp_path / "file").write_bytes(b"{}")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    read(tmp_path / "link")


@pytest.mark.parametrize("text", ["plain é", "a\nb", "a\u2028b", os.fsdecode(b"d\xe9g"), "\x1b[2J"])
def test_paths_in_messages_take_one_line(text: str) -> None:
    assert len(shown(Path(text)).encode().splitlines()) == len(shown(text).splitlines()) == 1
    assert "\x1b" not in shown(text)
    assert (shown(text) == text) == text.isprintable()
    assert str(EspalierError(f"file {text}: rename it")) == f"file {shown(text)}: rename it"
