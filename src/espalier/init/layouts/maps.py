"""Made-up inputs of the modules that call a convolution: sequences, images or volumes, larger than its kernel."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from espalier.init.filters.closed_form import Convolution
from espalier.init.layouts.arguments import arguments
from espalier.init.layouts.prove import token_widths
from espalier.init.layouts.scratch import Call

# Numbers of a map without a batch: code that takes channels for examples needs room for a map of each.
_LARGEST_ALONE = 300_000


def maps(owner: nn.Module, module: Convolution) -> Iterator[tuple[Call, tuple[int, ...]]]:
    """Yield inputs for the owner, larger than the kernel and of different sizes, and their axes of position."""
    reach = [step * (taps - 1) + 1 for taps, step in zip(module.kernel_size, module.dilation, strict=True)]
    # Multiples of the stride, so that padding that depends on the size is the same on both sides of it.
    sizes = [stride * (2 * (n + axis) + 9) for axis, (n, stride) in enumerate(zip(reach, module.stride, strict=True))]
    needs = [p for p in arguments(owner)[1:] if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    others: dict[str, Any] = {p.name: None for p in needs}
    generator = torch.Generator().manual_seed(3)
    for width in dict.fromkeys([*token_widths(owner), module.in_channels]):
        # Channels first, channels last, without a batch, time first.
        forms = (((1, width, *sizes), 2), ((1, *sizes, width), 1), ((width, *sizes), 1), ((*sizes, 1, width), 0))
        for shape, start in forms:
            if shape[0] == width and math.prod(shape) > _LARGEST_ALONE:
                continue
            x = torch.randn(shape, generator=generator, dtype=torch.float64)
            yield Call((x,), dict(others), sizes[0]), tuple(range(start, start + len(sizes)))
