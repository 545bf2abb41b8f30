"""The 8×8 hand-written digits that scikit-learn bundles: real images without a download."""

from __future__ import annotations

import gzip
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from espalier.data.labelled import ImageData, LabelledImages, set_aside
from espalier.errors import MissingExtraError

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
