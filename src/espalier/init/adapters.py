"""Adapters (LoRA and its kin): the layers below them, for the length of a look."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from espalier.init.layouts.registry import attribute

ADAPTED = "carries an adapter (LoRA): write the base model, then add adapters"


def is_adapted(layer: nn.Module) -> bool:
    """Return whether a layer is an adapter over another, known by the names that peft gives its parts."""
    return any(attribute(layer, name) is not None for name in ("base_layer", "lora_A"))


@contextmanager
def without_adapters(module: nn.Module) -> Iterator[bool]:
    """Put the layers below adapters in the adapters' place inside a module for the length of a ``with`` block.

    An adapter is known by its ``base_layer``, as peft names it. Weights are not copied and the adapters come back
    untouched, also after an exception.

    Yields:
        Whether there is an adapter in the module.
    """
    over = [
        (owner, name, child)
        for owner in module.modules()
        for name, child in owner.named_children()
        if isinstance(attribute(child, "base_layer"), nn.Module)
    ]
    try:
        for owner, name, child in over:
            base = child
            while isinstance(below := attribute(base, "base_layer"), nn.Module):
                base = below
            owner._modules[name] = base
        yield bool(over)
    finally:
        for owner, name, child in over:
            owner._modules[name] = child
