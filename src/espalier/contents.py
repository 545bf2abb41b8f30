"""The bytes of a tensor, read without a lasting hold on its memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_PIECE = 2**22


def bytes_in(tensor: Tensor) -> Iterator[memoryview]:
    """Yield the bytes of a dense tensor's numbers, in order and in pieces.

    Of copies: NumPy's view of a tensor makes its memory one that torch cannot resize any more, for good, which layers
    do that size their statistics by what they see.
    """
    numbers = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1).view(torch.uint8)
    for piece in numbers.split(_PIECE):
        yield piece.clone().numpy().data
