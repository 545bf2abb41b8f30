"""CIFAR-10 from the official Python pickles."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from espalier.data.labelled import ImageData, LabelledImages
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
