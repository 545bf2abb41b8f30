"""What the training loop asks of data: batches that depend on (seed, epoch, step) alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from espalier.randomness import derive_generator

IGNORED = -100
"""Target index of the positions that carry no loss."""


@runtime_checkable
class Source(Protocol):
    """A stream of (inputs, targets) batches with named evaluation splits.

    Targets are class indices ``(B,)``, class probabilities ``(B, C)`` (after mixup or cutmix), or token indices
    ``(B, L)`` in which −100 marks positions that carry no loss. Batches are a pure function of the arguments, so a
    resumed run sees what an unbroken one would have seen. A source whose files may change between a stop and a resume
    has a text ``digest``, too, of what they hold (see ``contents_digest``); one whose digest says where they lie, too,
    has a text ``contents``, or None, that does not.
    """

    @property
    def model_args(self) -> Mapping[str, Any]:
        """Arguments of the model that the data fixes: ``num_classes``, ``in_chans``, ``img_size`` or ``vocab_size``."""

    @property
    def eval_splits(self) -> tuple[str, ...]:
        """Names of the evaluation splits; the first carries the headline score."""

    def to(self, device: torch.device | str) -> Self:
        """Move what is held in memory to ``device`` and return the source."""

    def steps_per_epoch(self, batch_size: int) -> int:
        """Return how many batches of ``batch_size`` make one epoch (the ragged rest is dropped)."""

    def train_batch(self, seed: int, epoch: int, step: int, batch_size: int) -> tuple[Tensor, Tensor]:
        """Return batch ``step`` of ``epoch`` of the run with ``seed``, augmented, on the source's device."""

    def eval_batches(self, split: str, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield every example of ``split`` once, in a fixed order, without augmentation."""


def image_args(shape: Sequence[int]) -> dict[str, Any]:
    """Return the arguments of a model that images of ``shape`` (C, H, W) fix."""
    channels, height, width = shape
    return {"in_chans": channels, "img_size": height if height == width else (height, width)}


def require_step(step: int, steps: int, batch_size: int) -> None:
    """Refuse a step that an epoch of ``steps`` does not have.

    Raises:
        IndexError: it is none.
    """
    if not 0 <= step < steps:
        raise IndexError(f"step {step} of {steps} with batch_size {batch_size}")


@lru_cache(maxsize=2)
def epoch_order(size: int, seed: int, epoch: int, name: str = "order") -> Tensor:
    """Return the permutation of ``range(size)`` that an epoch goes through.

    The last ones are kept, so that a step does not cost a pass over the indices: nobody may write to them.
    """
    return torch.randperm(size, generator=derive_generator(seed, name, epoch))


def data_digest(source: Source) -> str:
    """Return 16 hexadecimal digits of what a source's data hold, wherever they lie; empty where it does not say."""
    named = hasattr(type(source), "contents")  # to ask the source itself would compute it
    found = getattr(source, "contents" if named else "digest", None)
    return "" if found is None else hashlib.sha256(str(found).encode()).hexdigest()[:16]


def contents_digest(*contents: Tensor | str) -> str:
    """Return the SHA-256 of tensors and texts: what a run's data must still be when it goes on.

    Args:
        contents: everything that batches are made of, on the CPU.
    """
    found = hashlib.sha256()
    for content in contents:
        if isinstance(content, Tensor):
            found.update(f"{content.dtype}{tuple(content.shape)}".encode())
            found.update(content.contiguous().numpy().data)
        else:
            found.update(f"{len(content)}:{content}".encode())
    return found.hexdigest()
