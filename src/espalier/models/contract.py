"""What our models share of timm's contract, and the draw that most of their layers start from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from espalier.errors import EspalierError
from espalier.nn.precision import is_tracing
from espalier.sizes import whole_number


class TimmContract(nn.Module):
    """A model with a head, whose blocks can be computed again in the backward pass."""

    grad_checkpointing: bool = False
    head: nn.Module

    def get_classifier(self) -> nn.Module:
        """Return the head."""
        return self.head

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass to save memory."""
        self.grad_checkpointing = enable

    def run_block(self, block: nn.Module, x: Tensor) -> Tensor:
        """Return the block's output; without gradients recomputing saves nothing, as no graph is kept."""
        if not (self.grad_checkpointing and torch.is_grad_enabled()):
            return block(x)
        # torch.compile takes no such context, and moves the buffers once by itself.
        once: dict[str, Any] = {} if is_tracing() else {"context_fn": lambda: (nullcontext(), _buffers_kept(block))}
        kept: Tensor = checkpoint(block, x, use_reentrant=False, **once)
        return kept


@contextmanager
def _buffers_kept(block: nn.Module) -> Iterator[None]:
    """Run a block on copies of its buffers: its batch norms have counted the batch before."""
    kept = [(module, dict(module._buffers)) for module in block.modules()]
    try:
        for module, buffers in kept:
            module._buffers.update({name: None if b is None else b.clone() for name, b in buffers.items()})
        yield
    finally:
        for module, buffers in kept:
            module._buffers.update(buffers)


def draw_uniform(weight: Tensor, bias: Tensor | None = None, generator: torch.Generator | None = None) -> None:
    """Draw a layer's weight and bias uniform on ±1/√fan-in, torch's default, from a generator."""
    bound = weight[0].numel() ** -0.5
    for parameter in (weight, bias):
        if parameter is not None:
            nn.init.uniform_(parameter, -bound, bound, generator=generator)


def new_head(net: nn.Module, kind: Callable[..., nn.Module], width: int, classes: int) -> nn.Module:
    """Return a fresh head on the device, in the dtype and in the mode of a network; without classes an identity.

    Raises:
        EspalierError: classes that are no whole number from 0.
    """
    classes = whole_number("num_classes", classes, least=0)
    like = next(net.parameters(), None)
    place = {} if like is None else {"device": like.device, "dtype": like.dtype}
    head = kind(width, classes, **place) if classes else nn.Identity()
    return head.train(net.training)  # an orthogonal head in training mode has no certificate


def check_divisor(name: str, divisor: int, of: str, size: int) -> None:
    """Raise ``EspalierError`` if an argument does not divide another one."""
    if divisor < 1 or size % divisor:
        raise EspalierError(f"{of} {size} is not divisible by {name} {divisor}: choose a divisor")


def check_ratio(name: str, ratio: float) -> None:
    """Raise ``EspalierError`` unless an argument is a finite number from 0."""
    if isinstance(ratio, bool) or not isinstance(ratio, Real) or not 0 <= ratio < math.inf:
        raise EspalierError(f"{name} is {ratio!r}: give a number from 0")
