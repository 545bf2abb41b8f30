"""Which layer of a model is which row of an earlier report, through whatever a model was wrapped in since."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from espalier.init.report import LayerReport

# What DDP, torch.compile, Fabric, FSDP1, activation checkpointing and peft put into the names of modules.
WRAPPERS = {
    "_checkpoint_wrapped_module",
    "_forward_module",
    "_fsdp_wrapped_module",
    "_orig_mod",
    "_original_module",
    "module",
}
_ADAPTED = {"base_layer", "base_model"}
Name = tuple[str, ...]


def plain_name(name: str) -> str:
    """Return a dotted name without what wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def match_rows(
    rows: Sequence[LayerReport], layers: Sequence[tuple[str, str]], bits: Callable[[int], str]
) -> dict[int, LayerReport]:
    """Return the row of an earlier report that belongs to each layer, where there is one.

    In this order: the same name but for known wrappers; the same bits, where the report is guarded; names of which one
    holds the other with something added (``encoder.layers.0.attn`` and ``layers.0.attn``), and then names with the same
    numbers and the same end. The last two count only where nothing else could be meant.

    Args:
        rows: of the earlier report.
        layers: name and family of every layer of the model.
        bits: index of a layer to the digest of its weights, or the empty string where it has none.
    """
    open_rows = dict(enumerate(rows))
    open_layers = dict(enumerate(layers))
    here, there = [_plain(name) for name, _ in layers], [_plain(row.layer) for row in rows]
    matched: dict[int, LayerReport] = {}

    def take(layer: int, row: int) -> None:
        matched[layer] = open_rows.pop(row)
        del open_layers[layer]

    def take_unique(alike: Callable[[int, int], bool]) -> None:
        """Take every layer and row that are alike, where neither is like any other."""
        partners = {layer: [row for row in open_rows if alike(layer, row)] for layer in open_layers}
        claims = Counter(row for found in partners.values() for row in found)
        for layer, found in partners.items():
            if len(found) == 1 and claims[found[0]] == 1:
                take(layer, found[0])

    take_unique(lambda layer, row: here[layer] == there[row])
    if open_layers and any(row.mark for row in open_rows.values()):
        digests = {layer: bits(layer) for layer in open_layers}
        for row, content in list(open_rows.items()):
            same = [layer for layer in open_layers if content.mark and digests[layer] == content.mark]
            if same:
                take(same[0], row)
    for alike in (_holds, _same_place):
        take_unique(
            lambda layer, row, alike=alike: (  # type: ignore[misc]
                rows[row].kind == layers[layer][1] and alike(here[layer], there[row])
            )
        )
    return matched


def _plain(name: str) -> Name:
    return tuple(part for part in plain_name(name).split(".") if part and part not in _ADAPTED)


def _holds(one: Name, other: Name) -> bool:
    """Return whether the longer name is the shorter one with parts added anywhere before its end."""
    short, long = sorted((one, other), key=len)
    rest = iter(long)
    return not short or (short[-1] == long[-1] and all(part in rest for part in short))


def _same_place(one: Name, other: Name) -> bool:
    numbers = [[part for part in name if part.isdigit()] for name in (one, other)]
    return numbers[0] == numbers[1] and bool(one) and bool(other) and one[-1] == other[-1]
