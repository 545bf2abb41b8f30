"""Attention whose heads are modules of their own: their maps stand in one tensor while the layer is looked at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from espalier.init.adapters import is_adapted
from espalier.init.layouts.registry import attribute
from espalier.init.layouts.scratch import CONTAINERS, is_bias

# The names of the weights of one map, one a head.
Group = tuple[str, ...]
# A part with more maps is attention by itself, with its own output projection, or a block of a network.
_MOST_MAPS = 3


def head_maps(module: nn.Module) -> tuple[list[Group], list[nn.Module]]:
    """Return the names of the weights of maps that parts alike have, part by part, and those parts.

    Parts alike are entries of a list, or neighbours of one class that is not torch's, with maps of the same names and
    shapes. Those that another module calls are its heads, not this one's.
    """
    groups, heads = list[Group](), list[nn.Module]()
    names = dict(module.named_modules())
    for place, holder in names.items():
        owners = (place[:end] for end, letter in enumerate(f"{place}.") if letter == "." and place[:end])
        if not all(isinstance(names.get(owner), CONTAINERS) for owner in owners):
            continue
        alike: dict[type, list[tuple[str, nn.Module]]] = {}
        for name, part in holder.named_children():
            if isinstance(holder, nn.ModuleList) or not type(part).__module__.startswith("torch."):
                alike.setdefault(type(part), []).append((f"{place}.{name}.".lstrip("."), part))
        for parts in alike.values():
            found = [_maps(part) for _, part in parts]
            if len(parts) > 1 and 1 <= len(found[0]) <= _MOST_MAPS and all(each == found[0] for each in found):
                heads += [part for _, part in parts]
                groups += [tuple(name + leaf for name, _ in parts) for leaf in found[0]]
    return groups, heads


def _maps(part: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of a part's matrices by name; nothing where one is neither a linear layer's nor its own."""
    found, owners = dict[str, torch.Size](), list[nn.Module]()
    for name, holder in part.named_modules():
        for own, parameter in holder.named_parameters(recurse=False):
            if parameter.ndim > 1 and not is_bias(holder, own):
                found[f"{name}.{own}".lstrip(".")] = parameter.shape
                owners.append(holder)
    readable = all(owner is part or is_linear(owner) for owner in owners)
    return found if readable and not any(map(is_adapted, owners)) else {}


def is_linear(layer: nn.Module) -> bool:
    """Return whether a module is a linear map of every token: also a convolution of one tap, and GPT-2's."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return layer.groups == 1 and layer.weight[0, 0].numel() == 1
    return isinstance(layer, nn.Linear) or attribute(layer, "nf") is not None


def is_its_own(module: nn.Module, group: Group) -> bool:
    """Return whether weights are matrices of the heads' own, and not those of linear layers in them."""
    return not is_linear(module.get_submodule(group[0].rpartition(".")[0]))


def groups_of(reading: Any) -> Sequence[Group]:
    """Return the maps, one a head, that a layout takes together."""
    return getattr(reading, "apart", ())


def stacked(module: nn.Module, group: Group) -> Tensor | None:
    """Return the weights of a map of each head as one view, heads first, or ``None`` where they do not lie so."""
    parts = [module.get_parameter(name).detach() for name in group]
    first, size = parts[0], parts[0].numel()
    together = all(
        part.shape == first.shape
        and part.is_contiguous()
        and part.untyped_storage()._cdata == first.untyped_storage()._cdata
        and part.storage_offset() == first.storage_offset() + place * size
        for place, part in enumerate(parts)
    )
    if not together:
        return None
    return first.as_strided((len(parts), *first.shape), (size, *first.stride()), first.storage_offset())


def put_together(module: nn.Module, groups: Sequence[Group]) -> None:
    """Give a scratch copy parameters that are views of one tensor for each group, with the same values."""
    for group in groups:
        if stacked(module, group) is None:
            _replace(module, group, torch.stack([module.get_parameter(name).detach() for name in group]))


@contextmanager
def together(module: nn.Module, groups: Sequence[Group], *, shapes: bool = False) -> Iterator[None]:
    """Put the weights of each group into one tensor for the length of a ``with`` block, then back into their own.

    What was written to them inside is copied to the module's own parameters; after an exception it is not.

    Args:
        module: the attention module.
        groups: names of weights, heads in order; those that are together already stay as they are.
        shapes: give parameters without storage (on the meta device), and copy nothing.
    """
    apart = [group for group in groups if stacked(module, group) is None]
    own = {name: module.get_parameter(name) for group in apart for name in group}
    try:
        for group in apart:
            parts = [own[name].detach() for name in group]
            _replace(module, group, torch.stack([part.to("meta") if shapes else part for part in parts]))
        yield
    except BaseException:
        _put_back(module, own)
        raise
    joined = _put_back(module, own)
    if not shapes:
        with torch.no_grad():
            for name, parameter in own.items():
                if not (parameter.is_meta or torch.equal(parameter, joined[name])):
                    parameter.copy_(joined[name])


def _replace(module: nn.Module, group: Group, values: Tensor) -> None:
    for name, value in zip(group, values, strict=True):
        place, _, leaf = name.rpartition(".")
        module.get_submodule(place)._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def _put_back(module: nn.Module, own: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Give a module its own parameters again, and return those that stood in their place."""
    joined = {name: module.get_parameter(name).detach() for name in own}
    for name, parameter in own.items():
        place, _, leaf = name.rpartition(".")
        module.get_submodule(place)._parameters[leaf] = parameter
    return joined
