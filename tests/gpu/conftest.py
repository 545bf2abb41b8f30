"""The device of these tests: CUDA, or what ESPALIER_TEST_DEVICE names (``cpu`` checks the tests' own code)."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    """Return the device under test; without it the test is skipped."""
    asked = torch.device(os.environ.get("ESPALIER_TEST_DEVICE", "cuda"))
    if asked.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device: set ESPALIER_TEST_DEVICE=cpu to run the same checks on the CPU")
    return asked


@pytest.fixture(autouse=True)
def full_float32() -> Iterator[None]:
    """Turn TF32 off, which would cost three of float32's seven digits, and put the switches back."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
