"""What a test needs beyond the library, and how to get it: a reason that ``make test`` repeats in its last lines."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import pytest
import torch

from espalier.errors import EspalierError
from espalier.nn import use_backend


def _kernels_run() -> bool:
    try:
        with use_backend("compiled"):
            return True
    except EspalierError:
        return False


KERNELS = pytest.mark.skipif(
    not _kernels_run(), reason="the C++ kernels are not built: apt-get install g++, then make kernels"
)
INDUCTOR = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT" or not shutil.which(os.environ.get("CXX", "g++")),
    reason="torch's compiler writes C++: apt-get install g++, and unset ATEN_CPU_CAPABILITY (it needs vectors)",
)
# The values of a parameter that goes through every implementation of the hot loops on a CPU.
IMPLEMENTATIONS = [pytest.param("compiled", marks=KERNELS), "torch"]


def data_folder(name: str) -> Path | None:
    """Return the folder of a data set below ``$ESPALIER_DATA``, or None where it is not there."""
    root = os.environ.get("ESPALIER_DATA")
    folder = Path(root) / name if root else None
    return folder if folder is not None and folder.is_dir() else None


def needs_data(name: str) -> pytest.MarkDecorator:
    """Skip a test unless ``$ESPALIER_DATA`` holds the data set ``name``."""
    reason = f"no data set {name}: put its files into a folder {name}, and set ESPALIER_DATA to the folder above it"
    return pytest.mark.skipif(data_folder(name) is None, reason=reason)


def needs_library(module: str, *packages: str) -> pytest.MarkDecorator:
    """Skip a test unless an optional library is installed."""
    found = importlib.util.find_spec(module) is not None
    return pytest.mark.skipif(not found, reason=f"no {module}: pip install {' '.join(packages)}")
