"""Images and labels in gzipped IDX files: Fashion-MNIST."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from espalier.data.labelled import ImageData, LabelledImages
from espalier.errors import EspalierError
from espalier.files import read_checked

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
