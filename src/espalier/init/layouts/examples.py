"""Whether the examples of a batch meet: keys of another example are other tokens, which a batch of one cannot show.

Several examples are run one by one and together. What comes out for each must be the same, wherever in the batch it
lies: rows are compared in the order of their projections on one vector.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from espalier.init.layouts.compare import is_near
from espalier.init.layouts.owners import calls_of_owner, sees_several
from espalier.init.layouts.scratch import Call, CannotRunError, copy_for_probe, leaves, run, untraced, watch

# Enough for pairs of pairs: two views of two images, two guided halves of two frames.
_EXAMPLES = 4
MEET = "its keys or values come from another example of the batch"


def examples_meet(look: Callable[[Call], Sequence[Tensor]], call: Call) -> bool:
    """Return whether an example comes out otherwise in a batch with others; False where that cannot be seen.

    Args:
        look: runs a call and returns what came out; it may raise ``CannotRunError``.
        call: on one example, or on a pair that belongs together.
    """
    first = next(iter((*call.args, *call.kwargs.values())), None)
    if not isinstance(first, Tensor) or first.ndim < 2:
        return False
    axis = 0 if first.shape[0] in (1, 2) else 1
    if axis and (first.ndim > 3 or first.shape[1] != 1):
        return False
    generator = torch.Generator().manual_seed(8)
    singles = [call, *(_another(call, first, generator) for _ in range(_EXAMPLES - 1))]
    with suppress(CannotRunError):
        apart = [[part.clone() for part in look(single)] for single in singles]
        for repeat in (False, True):
            with suppress(CannotRunError):
                return not _same_rows(apart, look(_joined(singles, axis, repeat=repeat)))
    return False


@untraced()
def owner_mixes_examples(owner: nn.Module, path: str, widths: Sequence[int], heads: int) -> bool:
    """Return whether a part of an owner gives an example another output in a batch with others; see ``calls``."""
    twin = copy_for_probe(owner)
    part, made, seen = twin.get_submodule(path), list[Tensor](), list[Call]()
    watch(part, lambda args, kwargs: seen.append(Call(args, kwargs, 0)), lambda out: made.extend(leaves(out)))

    def look(call: Call) -> list[Tensor]:
        made.clear()
        seen.clear()
        with suppress(CannotRunError):  # what fails after the part does not matter
            run(twin, call)
        if not made:
            raise CannotRunError("it does not call it")
        return made

    for call in calls_of_owner(owner, widths, heads, ()):
        with suppress(CannotRunError):
            look(call)
            if all(sees_several(part, one) for one in seen):
                return examples_meet(look, call)
    return False


def _another(call: Call, first: Tensor, generator: torch.Generator) -> Call:
    """Return the call on another example: tokens drawn anew wherever the first ones stand."""
    if first.is_floating_point():
        drawn = torch.randn(first.shape, generator=generator, dtype=torch.float64).to(first.dtype)
    else:
        drawn = torch.randint(int(first.max()) + 1, first.shape, generator=generator).to(first.dtype)

    def exchanged(value: Any) -> Any:
        alike = isinstance(value, Tensor) and value.shape == first.shape and value.dtype == first.dtype
        return drawn if alike and torch.equal(value, first) else value

    return _mapped(call, exchanged)


def _joined(calls: Sequence[Call], axis: int, *, repeat: bool) -> Call:
    """Return one call on all examples; what is the same for all of them stays, or is repeated."""
    every = [[*call.args, *call.kwargs.values()] for call in calls]
    together = {}
    for values in zip(*every, strict=True):
        value, last = values[0], values[-1]
        if isinstance(value, Tensor):
            batched = repeat and value.ndim > 1 and value.shape[0] == every[0][0].shape[axis] and not axis
            together[id(value)] = torch.cat(values, axis) if value is not last or batched else value
    return _mapped(calls[0], lambda value: together.get(id(value), value))


def _mapped(call: Call, change: Callable[[Any], Any]) -> Call:
    return replace(call, args=tuple(map(change, call.args)), kwargs={k: change(v) for k, v in call.kwargs.items()})


def _same_rows(apart: Sequence[Sequence[Tensor]], together: Sequence[Tensor]) -> bool:
    """Return whether the examples' rows are those of the batch, in any order."""
    generator = torch.Generator().manual_seed(9)
    if any(len(parts) != len(together) for parts in apart):
        return True
    for *singles, whole in zip(*apart, together, strict=True):
        if whole.ndim < 2 or not whole.is_floating_point() or whole.numel() != sum(part.numel() for part in singles):
            continue
        way = torch.randn(whole.shape[-1], generator=generator, dtype=torch.float64)
        if any(part.shape[-1] != len(way) for part in singles):
            continue
        rows = partial(torch.reshape, shape=(-1, len(way)))
        alone = torch.cat([rows(part) for part in singles]).double() @ way
        if not is_near((rows(whole).double() @ way).sort().values, alone.sort().values):
            return False
    return True
