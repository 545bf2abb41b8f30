"""What a tensor holds: whether it has numbers, and their bytes, read without a lasting hold on its memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_PIECE = 2**22


def without_numbers(tensor: Tensor) -> str:
    """Return why a tensor has a shape and no numbers that could be read or written; empty where it has them."""
    if tensor.is_meta:
        return "on the meta device"
    # A fake tensor (torch's FakeTensorMode) names the device that it stands for.
    return "made of fake tensors" if getattr(tensor, "fake_mode", None) is not None else ""


def bytes_in(tensor: Tensor) -> Iterator[memoryview]:
    """Yield the bytes of a dense tensor's numbers, in order and in pieces.

    Of copies: NumPy's view of a tensor makes its memory one that torch cannot resize any more, for good, which layers
    do that size their statistics by what they see.
    """
    numbers = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1).view(torch.uint8)
    for piece in numbers.split(_PIECE):
        yield piece.clone().numpy().data
