"""A linear layer whose output is used in parts, without one wide tensor that holds them all."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from espalier.nn.plain import is_plain
from espalier.nn.precision import is_tracing


def split_linear(layer: nn.Module, x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Return ``layer(x).split(sizes, -1)``, each part by a product of its own where the layer is a plain one.

    The backward pass then need not copy the gradients of the parts together, and no part has rows that lie apart.
    A layer that was replaced or has hooks is called as a module, so that adapters and observers see the whole.

    Args:
        layer: ``nn.Linear``, or what stands in its place.
        x: inputs (..., in).
        sizes: how many outputs each part has; their sum is the layer's.
    """
    if is_tracing() or not is_plain(
        layer, nn.Linear
    ):  # a compiler makes its own parts, and a graph reads better with one product
        parts: tuple[Tensor, ...] = layer(x).split(list(sizes), dim=-1)
        return parts
    weights = layer.weight.split(list(sizes))
    biases = [None] * len(weights) if layer.bias is None else layer.bias.split(list(sizes))
    return tuple(F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))
