"""Inputs that a module may run on, made up from its signature and attributes."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from espalier.init.layouts.arguments import ROTARY_NAME, is_sequence, named_arguments
from espalier.init.layouts.scratch import Call, bound

_ZEROS = re.compile(r"residual|alibi|bias")
_UNTOLD = object()

Form = Literal["usual", "zero masks", "full masks", "pairs", "numbers", "ids"]
"""What is given where a name leaves it open: masks of zeros, which are added, or of truth, which show all, rather than
none; and for names that say nothing, rather
than tokens, what lies between every two tokens (an adjacency), a number an example (a time), or token ids."""
_OPEN: tuple[Form, ...] = ("pairs", "numbers", "ids")
_MASKS: tuple[Form, ...] = ("zero masks", "full masks")
Turn = tuple[int, ...] | Literal["added", "distances"]
"""What stands for positions: the shape of tables of angles (``_rotary_shapes``), numbers that are added to tokens, or
features of all 2L − 1 distances between them."""
_OTHER_TURNS: tuple[Turn, ...] = ("distances", "added")


def calls(
    module: nn.Module,
    width: int,
    heads: int = 0,
    given: Collection[str] = (),
    others: Sequence[int] = (),
    lengths: Sequence[int] = (),
    batch: int = 1,
) -> Iterator[Call]:
    """Yield inputs that a module may run on, the most usual first: made from its signature alone.

    Args:
        module: the module.
        width: of a token.
        heads: query heads, if known: rotary tables are as wide as one.
        given: names of optional arguments that are given, too.
        others: widths of another sequence's tokens, tried after ``width``.
        lengths: numbers of tokens, tried after the usual ones.
        batch: sequences; of several no other form is made than one after the other.
    """
    named = named_arguments(module)
    if not named:
        return
    generator = torch.Generator().manual_seed(1)
    first, rest = named[0], named[1:]
    needed = [p for p in rest if p.default is p.empty or p.name in given]
    angles = [p for p in rest if ROTARY_NAME.search(p.name) and not re.search("pos_emb_dim|key_value", p.name)]
    turned = [p for p in rest if p in needed or p in angles]
    share = width // heads if heads and width % heads == 0 else 8
    # Rotary angles are given where they can be; a layer may want them in a form of its own, and do without.
    rounds: list[tuple[list[inspect.Parameter], Sequence[Turn]]] = [(turned, _rotary_shapes(module, share))]
    rounds += [(needed, rounds[0][1])] if turned != needed else []
    rounds += [(turned, _OTHER_TURNS)] if any(ROTARY_NAME.search(p.name) for p in turned) else []
    for needs, found in rounds:
        turns = found if any(ROTARY_NAME.search(p.name) for p in needs) else [()]
        wide = dict.fromkeys([width, *others]) if any(is_sequence(p) or p.name in given for p in needs) else [width]
        counts = [*_lengths(module, (width, share, heads)), *lengths]
        for form, other, length, turn in itertools.product(forms(needs), wide, counts, turns):
            # Of the forms that an open name may have, only the first of all else is tried.
            if form in _OPEN and (other, length, turn) != (width, counts[0], turns[0]):
                continue
            rows = next(side for side in range(int(length**0.5), 0, -1) if length % side == 0)
            shapes = [(batch, length, width), (length, 1, width), (length, width), (1, rows, length // rows, width)]
            # At last with channels first: an image, and a signal.
            tried = shapes[:1] if batch > 1 else shapes[:3] if form in _OPEN else [*shapes, shapes[3], shapes[0]]
            for place, shape in enumerate(tried):
                # With mean 0 and size 1, as a norm leaves a token: one inside the module does not change them.
                x = torch.randn(shape, generator=generator, dtype=torch.float64)
                x = nn.functional.layer_norm(x, (width,), eps=0.0) if width > 2 else x
                x = x if place < len(shapes) else x.movedim(-1, 1).contiguous()
                second = x.shape if other == width else (*x.shape[:-1], other)
                another = partial(torch.randn, second, generator=generator, dtype=torch.float64)
                values = {p: argument(p, x, another, length, turn, heads, form) for p in needs}
                supposed = form in _OPEN or form in _MASKS or isinstance(turn, str)
                supposed = supposed or any(_is_unread(p) and isinstance(values[p], Tensor) for p in needs)
                yield replace(call_with(first, x, values, length), supposed=supposed)


def call_with(first: inspect.Parameter, x: Tensor, values: Mapping[inspect.Parameter, Any], length: int) -> Call:
    """Return a call with a first argument and values of others."""
    positional = [value for p, value in values.items() if p.kind is p.POSITIONAL_ONLY]
    named = {p.name: value for p, value in values.items() if p.kind is not p.POSITIONAL_ONLY}
    if first.kind is first.KEYWORD_ONLY:
        return Call((), {first.name: x, **named}, length)
    return Call((x, *positional), named, length)


def forms(needs: Collection[inspect.Parameter]) -> list[Form]:
    """Return the forms that matter for these arguments, the most usual first."""
    found = list[Form](["usual"])
    if any("mask" in p.name for p in needs):
        found += _MASKS
    if any(map(_is_unread, needs)):
        found += _OPEN
    return found


def _is_unread(parameter: inspect.Parameter) -> bool:
    """Return whether an argument is needed and nothing says what it is."""
    if parameter.default is not parameter.empty or is_sequence(parameter) or ROTARY_NAME.search(parameter.name):
        return False
    return _told(parameter, torch.zeros(1, 1, 1), 1, (), 0, "usual") is _UNTOLD


def count_tokens(part: nn.Module, call: Call, width: int) -> int:
    """Return the number of tokens of a width in the first input, 0 if it has none."""
    first = next(iter(bound(part, call).values()), None)
    if not isinstance(first, Tensor) or not first.ndim:
        return 0
    if not first.is_floating_point():  # token ids
        return first.numel()
    channels_first = first.ndim in (3, 4) and first.shape[1] == width != first.shape[-1]
    return first.numel() // (width if channels_first else first.shape[-1])


def _lengths(module: nn.Module, sizes: Collection[int]) -> list[int]:
    """Return numbers of tokens to try: one that is none of its sizes, and those that a windowed module states."""
    lengths = [length for length in (6, 10, 14, 18) if length not in sizes][:1]
    for name in ("window_area", "num_patches", "seq_len", "window_size"):
        stated = getattr(module, name, None)
        if isinstance(stated, int) and 1 < stated <= 400:
            lengths += [stated, stated * stated] if name == "window_size" else [stated]
        elif isinstance(stated, tuple | list) and all(isinstance(size, int) for size in stated):
            lengths.append(torch.Size(stated).numel())
    return [length for length in dict.fromkeys(lengths) if length <= 400]


def _rotary_shapes(module: nn.Module, share: int) -> list[tuple[int, ...]]:
    """Return shapes of a rotary table, −1 where it has its positions."""
    stated = [getattr(module, name, None) for name in ("head_dim", "rotary_ndims", "rotary_dim", "qk_rope_head_dim")]
    known = [width for width in stated if isinstance(width, int) and width > 1]
    # Often half of a head is turned, or a quarter.
    widths = dict.fromkeys([*known, share, share // 2, *(width // 2 for width in known), max(2, share // 4)])
    return [shape for width in widths for shape in ((1, -1, width), (-1, width), (1, -1, 1, width))]


def argument(
    parameter: inspect.Parameter,
    x: Tensor,
    another: Callable[[], Tensor],
    length: int,
    turn: Turn,
    heads: int,
    form: Form,
) -> Any:
    """Return what an argument may be, by its name.

    Args:
        parameter: the argument.
        x: the first one.
        another: makes another sequence's tokens.
        length: tokens of the first one.
        turn: what stands for positions, see ``Turn``.
        heads: query heads.
        form: what is given where the name leaves it open.
    """
    value = _told(parameter, x, length, turn, heads, form)
    if value is not _UNTOLD:
        return value
    if not is_sequence(parameter) and parameter.default is parameter.empty:
        if form == "pairs":
            return torch.ones(length, length, dtype=torch.bool)
        if form == "numbers":
            return torch.ones(len(x), dtype=torch.float64)
        if form == "ids":
            return torch.zeros(len(x), length, dtype=torch.long)
    stated = str(parameter.annotation)
    if is_sequence(parameter) or "Tensor" in stated or parameter.annotation is parameter.empty:
        return another()
    return None


def _told(parameter: inspect.Parameter, x: Tensor, length: int, turn: Turn, heads: int, form: Form) -> Any:
    """Return what an argument's name says that it is, or ``_UNTOLD``."""
    name, stated = parameter.name, str(parameter.annotation)
    if ROTARY_NAME.search(name):
        if turn == "added":
            return torch.zeros_like(x)
        if turn == "distances":
            generator = torch.Generator().manual_seed(4)
            return torch.randn(1, 2 * length - 1, x.shape[-1], generator=generator, dtype=torch.float64)
        # The same angle for all channels fits every way to pair them.
        angles = (torch.arange(length)[:, None] * torch.full(turn[-1:], 0.3, dtype=torch.float64)).reshape(turn)
        both = {"cos": angles.cos(), "sin": angles.sin()}
        told = [wave for word, wave in both.items() if word in name.split("_")]
        if not told and (stated == "torch.Tensor" or "freqs" in name):
            return torch.polar(torch.ones_like(angles), angles)
        return told[0] if len(told) == 1 else tuple(both.values())
    zeros = torch.zeros(1, 1, length, length, dtype=torch.float64)
    masks = {"zero masks": zeros, "full masks": zeros == 0}
    made = (
        ("mask" in name, masks.get(form)),
        (name == "alibi", torch.zeros(max(heads, 1), 1, length, dtype=torch.float64)),
        (_ZEROS.search(name), torch.zeros_like(x)),
        ("cu_seqlens" in name, torch.tensor([0, length], dtype=torch.int32)),
        (re.search(r"position_ids|positions|^pos$", name), torch.arange(length)[None]),
        (name.lower() in ("h", "height"), 2),
        (name.lower() in ("w", "width"), length // 2),
        (re.search(r"past|cache", name), None),
        (re.search(r"^output|^use_|^return", name) or stated == "bool", False),
        (stated == "int", 0),
        # What is added to tokens, and often not to those of values, is left out.
        (re.search(r"(^|_)pos(_|e|i|$)", name), torch.zeros_like(x)),
    )
    return next((value for holds, value in made if holds), _UNTOLD)
