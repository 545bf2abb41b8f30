"""Which layers have numbers in common: what is written to one of them shows in all."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.nn.parameter import is_lazy

from espalier.contents import without_numbers
from espalier.init.families.base import nowhere, tensors
from espalier.init.layouts import Layer, Skipped

# A device, and the addresses of the first and the last number of a view there.
Span = tuple[str, int, int]


def memory_of(layer: Layer) -> frozenset[Span]:
    """Return where a layer's views lie; of one that is left alone, or in pieces, where its parameters do."""
    found = layer.found
    if isinstance(found, Skipped) or nowhere(found):
        return spans_of(layer.part.parameters())
    return spans_of(view for _, view in tensors(found))


def spans_of(values: Iterable[Tensor]) -> frozenset[Span]:
    """Return where tensors lie; one without numbers has no place."""
    spans = set[Span]()
    for value in values:
        if hasattr(value, "to_local"):  # not where a shard lies: some ranks may have none of it
            spans.add(("shard", id(value), id(value)))
            continue
        bare = is_lazy(value) or value.is_sparse or value.numel() == 0 or without_numbers(value)
        if not bare and value.data_ptr():
            reach = sum((size - 1) * step for size, step in zip(value.shape, value.stride(), strict=True))
            start = value.data_ptr()
            spans.add((str(value.device), start, start + int(reach) * value.element_size()))
    return frozenset(spans)


def overlap(spans: frozenset[Span], others: frozenset[Span]) -> bool:
    """Return whether two layers have numbers in common."""
    return any(a[0] == b[0] and a[1] <= b[2] and b[1] <= a[2] for a in spans for b in others)


def others_of(layer: Layer, spans: frozenset[Span]) -> str:
    """Return in words which parameters outside of a layer have numbers of it, or the empty string."""
    own = set(map(id, layer.part.modules()))
    outside = ((name, module) for name, module in layer.names.items() if id(module) not in own)
    named = ((f"{name}.{key}".lstrip("."), p) for name, module in outside for key, p in module._parameters.items())
    found = [name for name, parameter in named if parameter is not None and overlap(spans_of([parameter]), spans)]
    return f"has numbers in common with {', '.join(found[:3])}{' …' * (len(found) > 3)}" if found else ""
