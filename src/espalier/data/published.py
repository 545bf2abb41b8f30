"""Published sets of small images, from their authors' own files: CIFAR-10, Fashion-MNIST, scikit-learn's digits."""

from __future__ import annotations

import gzip
import math
import pickle
import struct
import zlib
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from espalier.data.labelled import ImageData, LabelledImages, set_aside
from espalier.errors import EspalierError, MissingExtraError
from espalier.files import read_checked

CIFAR10_MD5: Mapping[str, str] = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
"""Published md5 of every file that is read."""

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def read_cifar10(folder: Path, md5: Mapping[str, str] = CIFAR10_MD5) -> ImageData:
    """Read CIFAR-10 (Krizhevsky 2009): 50,000 training and 10,000 test images, 3×32×32.

    Args:
        folder: ``cifar-10-batches-py`` or the folder that holds it.
        md5: published md5 by file name; no file is unpickled before its own was confirmed.

    Raises:
        EspalierError: a file is missing or is not the published one.
    """
    inner = folder / "cifar-10-batches-py"
    folder = inner if inner.is_dir() else folder
    batches = {name: _read_batch(folder / name, digest) for name, digest in md5.items()}
    test = batches.pop("test_batch")
    images_NCHW = torch.cat([batch.images_NCHW for batch in batches.values()])
    labels_N = torch.cat([batch.labels_N for batch in batches.values()])
    return ImageData(LabelledImages(images_NCHW, labels_N), test, CIFAR10_CLASSES)


def _read_batch(path: Path, md5: str) -> LabelledImages:
    # A pickle can run any code. This one is opened only because its md5 is that of the file the authors published.
    batch = pickle.loads(read_checked(path, md5), encoding="bytes")
    pixels = np.ascontiguousarray(batch[b"data"]).reshape(-1, 3, 32, 32)
    return LabelledImages(torch.from_numpy(pixels), torch.tensor(batch[b"labels"]))


FASHION_MNIST_MD5: Mapping[str, str] = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}
"""Published md5 of every file that is read."""

FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def read_fashion_mnist(folder: Path, md5: Mapping[str, str] = FASHION_MNIST_MD5) -> ImageData:
    """Read Fashion-MNIST (Xiao et al. 2017): 60,000 training and 10,000 test images, 1×28×28.

    Args:
        folder: where the four official ``*-ubyte.gz`` files lie.
        md5: published md5 by file name.

    Raises:
        EspalierError: a file is missing, damaged or not the published one.
    """
    arrays = {name: parse_idx(read_checked(folder / name, digest), folder / name) for name, digest in md5.items()}

    def split(prefix: str) -> LabelledImages:
        images_NHW = arrays[f"{prefix}-images-idx3-ubyte.gz"]
        return LabelledImages(images_NHW[:, None], arrays[f"{prefix}-labels-idx1-ubyte.gz"].long())

    return ImageData(split("train"), split("t10k"), FASHION_MNIST_CLASSES)


def parse_idx(compressed: bytes, path: Path) -> Tensor:
    """Return the uint8 tensor that a gzipped IDX file holds.

    The format: two zero bytes, the type (8 = unsigned byte), the number of axes, every axis' length as a big-endian
    32-bit integer, then the values.

    Args:
        compressed: the file's content.
        path: its name, for messages.

    Raises:
        EspalierError: the content is truncated, damaged or of another type.
    """
    try:
        content = gzip.decompress(compressed)
    except (EOFError, OSError, zlib.error) as error:
        raise EspalierError(f"{path} is no whole gzip file ({error}): fetch it again") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08" or content[3] > 8 or len(content) < 4 + 4 * content[3]:
        raise EspalierError(f"{path} begins as no IDX file of unsigned bytes on at most 8 axes: fetch it again")
    start = 4 + 4 * content[3]
    shape = struct.unpack(f">{content[3]}I", content[4:start])
    if len(content) - start != math.prod(shape):
        raise EspalierError(f"{path} holds {len(content) - start} of {math.prod(shape)} bytes: fetch it again")
    # frombuffer gives a read-only view of the bytes; torch wants memory of its own.
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy())


DIGITS_TEST_SIZE = 360


def read_digits() -> ImageData:
    """Read the UCI optical digits' test part (Alpaydin & Kaynak 1998): 1,437 training and 360 test images, 1×8×8.

    The grey values 0…16 become round(v·255/16), from which they can be recovered exactly. The 360 test images are
    the first of a fixed stratified order of all 1,797.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    package = find_spec("sklearn")
    if package is None or package.origin is None:
        raise MissingExtraError("the digits come with scikit-learn: pip install 'torch-espalier[train]'")
    # Read the file that sklearn.datasets.load_digits reads. Importing sklearn for it would cost every worker process
    # of a study over two seconds.
    with gzip.open(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", "rt") as file:
        table = np.loadtxt(file, delimiter=",")
    pixels = torch.from_numpy(np.rint(table[:, :-1] * (255 / 16)).astype(np.uint8)).view(-1, 1, 8, 8)
    digits = LabelledImages(pixels, torch.from_numpy(table[:, -1].astype(np.int64)))
    return set_aside(digits, DIGITS_TEST_SIZE, tuple("0123456789"), "digits")
