"""What our models share of timm's contract, and the draw that most of their layers start from."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from espalier.errors import EspalierError


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
        kept: Tensor = checkpoint(block, x, use_reentrant=False)
        return kept


def draw_uniform(weight: Tensor, bias: Tensor | None = None, generator: torch.Generator | None = None) -> None:
    """Draw a layer's weight and bias uniform on ±1/√fan-in, torch's default, from a generator."""
    bound = weight[0].numel() ** -0.5
    for parameter in (weight, bias):
        if parameter is not None:
            nn.init.uniform_(parameter, -bound, bound, generator=generator)


def check_sizes(least: int = 1, **sizes: float) -> None:
    """Raise ``EspalierError`` for the first of the arguments, by their names, that is below ``least``."""
    for name, size in sizes.items():
        if size < least:
            raise EspalierError(f"{name} is {size}: give at least {least}")
