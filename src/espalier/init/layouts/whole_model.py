"""What a model hands to its layers when it is run whole, on tokens or an image made up from its first layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from espalier.init.layouts.arguments import sequences, takes_more
from espalier.init.layouts.made_up import count_tokens
from espalier.init.layouts.owners import LARGEST, first_inputs, hidden_sequences
from espalier.init.layouts.positions import moved, one_sequence_each
from espalier.init.layouts.scratch import (
    Call,
    CannotRunError,
    copy_for_probe,
    fresh,
    leaves,
    owner_of,
    run,
    untraced,
    watch,
)


def refuse_second_sequence(names: Mapping[str, nn.Module], name: str) -> None:
    """Raise if anything above a layer may be handed another sequence: a run of the model on one would not show it.

    Raises:
        CannotRunError: it may.
    """
    place = name
    while (owner := owner_of(names, place)) is not None:
        place, module = owner
        hidden = sequences(module) if place else hidden_sequences(module)
        if hidden or sequences(module, needed=True):
            raise CannotRunError(f"{type(module).__name__}, above it, may be given another sequence")
        if not place and takes_more(module):
            raise CannotRunError(f"{type(module).__name__}, above it, takes arguments without names")


@untraced()
def calls_in_model(model: nn.Module, kind: type[nn.Module]) -> dict[str, list[Call]]:
    """Return the calls to every module of a class in a run of a copy of a model, by the module's name.

    Raises:
        CannotRunError: the model is too large, or takes none of ``first_inputs``.
    """
    if sum(parameter.numel() for parameter in model.parameters()) > LARGEST:
        raise CannotRunError("the model is too large to be run")
    twin, why = copy_for_probe(model), "it does not say what it takes"
    seen, by = list[Call](), list[str]()
    for name, part in twin.named_modules():
        if type(part) is kind:

            def record(args: Any, kwargs: Any, name: str = name) -> None:
                seen.append(Call(fresh(args), fresh(kwargs), 0))
                by.append(name)

            watch(part, record)
    for inputs in first_inputs(twin, 1, torch.Generator().manual_seed(5)):
        seen.clear()
        by.clear()
        call = Call((inputs,), {}, 0)
        try:
            run(twin, call)
        except CannotRunError as error:
            why = str(error)
            continue
        found: dict[str, list[Call]] = {}
        for name, made in zip([*by], one_sequence_each(seen, partial(run, twin, moved(call))), strict=True):
            found.setdefault(name, []).append(made)
        return found
    raise CannotRunError(f"{type(model).__name__} does not run on made-up inputs ({why})")


def one_sequence(part: nn.Module, call: Call, width: int) -> Call:
    """Return a call on the first sequence of several, as of the windows that an image was cut into."""
    first = next(leaves((call.args, call.kwargs)), None)
    if first is not None and first.ndim > 2 and first.shape[0] > 1 and first.shape[1] > 1:
        count = first.shape[0]

        def cut(value: Any) -> Any:
            rows = isinstance(value, Tensor) and value.ndim > 1 and len(value) == count
            return value[:1] if rows else value

        call = Call(tuple(map(cut, call.args)), {name: cut(value) for name, value in call.kwargs.items()}, 0)
    return replace(call, length=count_tokens(part, call, width))


def sequence_first(call: Call) -> Call:
    """Return a call on (1, L, d) as one on (L, 1, d): every tensor of the first one's shape is turned."""
    first = next(leaves((call.args, call.kwargs)), None)

    def turned(value: Any) -> Any:
        tokens = isinstance(value, Tensor) and first is not None and value.shape == first.shape and value.ndim == 3
        return value.transpose(0, 1) if tokens else value

    return replace(call, args=tuple(map(turned, call.args)), kwargs={k: turned(v) for k, v in call.kwargs.items()})
