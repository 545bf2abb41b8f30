"""Inputs that whoever calls a layer may run on: tokens, token ids, images; and what it hands the layer on such."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from espalier.init.layouts.arguments import NAMELESS, arguments, named_arguments, sequences
from espalier.init.layouts.keys import module_key
from espalier.init.layouts.made_up import argument, call_with, calls, count_tokens, forms
from espalier.init.layouts.positions import moved, one_sequence_each
from espalier.init.layouts.scratch import Call, CannotRunError, copy_for_probe, fresh, leaves, run, untraced, watch
from espalier.init.layouts.verdicts import cached

# Sides of images, the most usual first.
_SIDES = (32, 64, 224, 28, 16, 8)
# A map with more channels is no image, and was made by layers before.
_MOST_COLOURS = 16
# Parameters of a model that is run whole, whose copy takes eight bytes of each, and how often that is tried.
LARGEST, _MOST_CALLS = 2**27, 48
# A longer sequence or a larger vocabulary of positions is not made up.
_LONGEST = 400
# Optional arguments that hold no other tokens.
_LABELS = re.compile(r"^(targets?|labels?)$|mask|past|cache|^return|^use|^output")


def first_inputs(model: nn.Module, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield what the first layer of a model takes: token ids, rows of features, or images of several sizes."""
    kinds = nn.Embedding | nn.Linear | nn.Conv2d
    first = next((module for module in model.modules() if isinstance(module, kinds)), None)
    if isinstance(first, nn.Embedding):
        yield torch.randint(first.num_embeddings, (batch, 16), generator=generator)
    elif isinstance(first, nn.Linear):
        yield torch.randn(32, first.in_features, generator=generator)
    elif isinstance(first, nn.Conv2d):
        for size in _SIDES:
            yield torch.randn(batch, first.in_channels, size, size, generator=generator)


def calls_of_owner(
    owner: nn.Module, widths: Sequence[int], heads: int, given: Collection[str], *, pairs: bool = False
) -> Iterator[Call]:
    """Yield inputs that a module may run on: tokens of these widths, else what its first layers take.

    Args:
        owner: the module.
        widths: of a token, to try.
        heads: query heads of the layer that it calls.
        given: names of optional arguments that are given, too; a model is run whole only with all that may be another
            sequence, since a run without says nothing of them.
        pairs: also sequences two by two, as what compares two of them takes, and a second one of another width.
    """
    for batch, width in itertools.product((1, 2) if pairs else (1,), dict.fromkeys(widths)):
        yield from calls(owner, width, heads, given, others=widths if pairs else (), batch=batch)
    with suppress(CannotRunError):
        if not hidden_sequences(owner, given):
            yield from cached(("whole", module_key(owner), tuple(widths), given), partial(_whole, owner, widths, given))


@untraced()
def _whole(owner: nn.Module, widths: Sequence[int], given: Collection[str]) -> list[Call]:
    """Return token ids, batch first and sequence first, or an image on which a module runs, with all that it needs.

    Raises:
        CannotRunError: it is too large, or runs on none of them.
    """
    if sum(parameter.numel() for parameter in owner.parameters()) > LARGEST:
        raise CannotRunError("the model is too large to be run")
    twin = copy_for_probe(owner)
    for call in itertools.islice(_whole_calls(twin, widths, given), _MOST_CALLS):
        with suppress(CannotRunError):
            run(twin, call)
            return [call, _turned(call)]
    for call in _batches(twin, widths):
        with suppress(CannotRunError):
            run(twin, call)
            return [call]
    raise CannotRunError("it runs on no made-up inputs")


class _Batch(dict[Any, Any]):
    """A batch by names, in which everything is found that is asked for, each of its own numbers; labels are not."""

    def __init__(self, make: Callable[[str], Any]) -> None:
        super().__init__()
        self.make = make

    def __missing__(self, key: Any) -> Any:
        self[key] = self.make(key)
        return self[key]

    def get(self, key: Any, default: Any = None) -> Any:
        is_label = key not in self
        return default if is_label else self[key]

    def pop(self, key: Any, default: Any = None) -> Any:
        return self.get(key, default)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and not _LABELS.search(key)


def _batches(owner: nn.Module, widths: Sequence[int]) -> Iterator[Call]:
    """Yield a dictionary of what a module takes out of its one argument, where that is a batch by names."""
    named = named_arguments(owner)
    if len(named) != 1:
        return
    generator = torch.Generator().manual_seed(1)
    tokens = (torch.randn(1, 6, width, generator=generator) for width in dict.fromkeys(widths))
    for x in itertools.chain(_raw_inputs(owner, generator), tokens):
        like, length = _like(x)
        for mask in (None, torch.ones(1, length, dtype=torch.bool), torch.ones(1, length, dtype=torch.long)):

            def make(key: str, like: Any = like, length: int = length, mask: Tensor | None = mask) -> Any:
                asked = inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY)
                another = partial(like, generator=generator)
                return mask if "mask" in key else argument(asked, another(), another, length, (1,), 0, "usual")

            batch = _Batch(make)
            with suppress(Exception):  # of anybody's code: then what it asked for is not what it takes
                owner(batch)
                yield Call(({**batch},), {}, length)


def _like(x: Tensor) -> tuple[Callable[..., Any], int]:
    """Return what draws another input of this form, and the length of one that is made up beside it."""
    if x.is_floating_point():
        return partial(torch.randn, x.shape), x.shape[1]
    return partial(torch.randint, int(x.max()) + 1, x.shape), x.numel()


def _turned(call: Call) -> Call:
    """Return a call on (1, L) token ids as one on (L, 1)."""

    def turned(value: Any) -> Any:
        ids = isinstance(value, Tensor) and value.shape == (1, call.length) and not value.is_floating_point()
        return value.T if ids else value

    return replace(call, args=tuple(map(turned, call.args)), kwargs={k: turned(v) for k, v in call.kwargs.items()})


def _whole_calls(owner: nn.Module, widths: Sequence[int], given: Collection[str]) -> Iterator[Call]:
    named = named_arguments(owner)
    needs = [p for p in named[1:] if p.default is p.empty or p.name in given]
    generator = torch.Generator().manual_seed(1)
    for x in _raw_inputs(owner, generator) if named else ():
        like, length = _like(x)
        others: list[Callable[..., Any]] = [like]
        others += [partial(torch.randn, (1, length, width)) for width in dict.fromkeys(widths) if needs]
        for another, form in itertools.product(others, forms(needs)):
            values = {p: argument(p, x, partial(another, generator=generator), length, (1,), 0, form) for p in needs}
            yield call_with(named[0], x, values, length)


def hidden_sequences(owner: nn.Module, given: Collection[str] = ()) -> list[str]:
    """Return the optional arguments, of those not given, that may hold another sequence's tokens."""
    hidden = [name for name in sequences(owner, any_name=True) if name not in given and not _LABELS.search(name)]
    if not hidden:
        return []
    instead = cached(("instead", module_key(owner), *hidden), partial(_instead_of_ids, owner, hidden))
    return [name for name in hidden if name not in instead]


@untraced()
def _instead_of_ids(owner: nn.Module, names: Collection[str]) -> list[str]:
    """Return those arguments that take the place of token ids: a model runs on either and refuses both."""
    first, embedding = arguments(owner)[0], next((p for p in owner.modules() if isinstance(p, nn.Embedding)), None)
    positional = first.kind is first.POSITIONAL_ONLY
    if embedding is None or positional or sum(parameter.numel() for parameter in owner.parameters()) > LARGEST:
        return []
    twin, generator = copy_for_probe(owner), torch.Generator().manual_seed(1)
    ids = torch.randint(embedding.num_embeddings, (1, 6), generator=generator)
    tokens = torch.randn(1, 6, embedding.embedding_dim, generator=generator, dtype=torch.float64)

    def runs(**given: Tensor) -> bool:
        with suppress(CannotRunError):
            run(twin, Call((), given, 6))
            return True
        return False

    if not runs(**{first.name: ids}):
        return []
    return [name for name in names if runs(**{name: tokens}) and not runs(**{first.name: ids, name: tokens})]


def _raw_inputs(module: nn.Module, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield token ids where a module has embeddings, and images where it has convolutions."""
    embeddings = [part for part in module.modules() if isinstance(part, nn.Embedding)]
    if embeddings:
        # Where positions are added whole, only their number of tokens fits.
        placed = [p.shape[-2] for name, p in module.named_parameters() if "pos" in name and p.ndim > 1]
        counts = [part.num_embeddings for part in embeddings]
        for vocabulary in dict.fromkeys([counts[0], min(counts)]):
            for length in dict.fromkeys([6, 16, *(count for count in placed if 1 < count <= _LONGEST)]):
                yield torch.randint(vocabulary, (1, length), generator=generator)
    first = next((part for part in module.modules() if isinstance(part, nn.Conv2d)), None)
    if first is not None and first.in_channels <= _MOST_COLOURS:
        for side in _SIDES:
            yield torch.randn(1, first.in_channels, side, side, generator=generator)


@untraced()
def calls_of_part(
    owner: nn.Module, path: str, widths: Sequence[int], heads: int, given: Collection[str] = ()
) -> list[Call]:
    """Return the calls that a copy of an owner makes to one of its parts, from the first made-up input that it takes.

    Args:
        owner: the module.
        path: of the part.
        widths: of a token, to try.
        heads: see ``calls``.
        given: see ``calls``.

    Raises:
        CannotRunError: it runs on none of them, or never calls the part.
    """
    twin = copy_for_probe(owner)
    why, part = "", twin.get_submodule(path)
    seen: list[Call] = []

    watch(part, lambda args, kwargs: seen.append(Call(fresh(args), fresh(kwargs), 0)))
    for call in calls_of_owner(owner, widths, heads, given):
        seen.clear()
        try:
            run(twin, call)
        except CannotRunError as error:
            why = why or str(error)
        if seen and all(sees_several(part, one) for one in seen):
            made = one_sequence_each(seen, partial(run, twin, moved(call)))
            counts = [count_tokens(part, one, widths[0]) or call.length for one in made]
            return [replace(one, length=n, supposed=call.supposed) for one, n in zip(made, counts, strict=True)]
        why = why or ("it attends over one token" if seen else "")
    raise CannotRunError(f"{type(owner).__name__}, which calls it, does not run on made-up inputs ({why or NAMELESS})")


def sees_several(part: nn.Module, call: Call) -> bool:
    """Return whether torch's layer attends over several tokens: over one, any keys seem to be its own."""
    first = next(leaves((call.args, call.kwargs)), None)
    if not isinstance(part, nn.MultiheadAttention) or first is None or first.ndim < 2:
        return True
    return first.shape[int(part.batch_first and first.ndim == 3)] > 1
