"""Which outputs of a module move when one position of its input does, with all of a filter's weight on one tap."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from espalier.init.layouts.scratch import Call, CannotRunError, run

# Input position minus output position that a tap connects, axis by axis.
Offset = tuple[int, ...]
# How far above the median move of all outputs one must stand that the moved input reaches through a tap.
_ABOVE_MIXING = 5.0


@dataclass(frozen=True)
class Moves:
    """What moves, positions before features, for every input position of one cell of strides.

    Attributes:
        changes: by input position.
        strides: inputs for each output, by axis.
        noise: what is no move.
        keeps: whether there is one output for every ``strides`` inputs.
    """

    changes: dict[tuple[int, ...], Tensor]
    strides: tuple[int, ...]
    noise: float
    keeps: bool

    def offsets(self, above: float = _ABOVE_MIXING) -> set[Offset]:
        """Return input minus output position of outputs that move more than all do.

        Args:
            above: times the median; what mixes all positions (a norm over them, a pooled gate) moves each a little.
        """
        found = set[Offset]()
        for place, change in self.changes.items():
            sizes = self._sizes(change)
            for hit in (sizes > max(self.noise, above * float(sizes.median()))).nonzero().tolist():
                found.add(tuple(p - stride * o for p, stride, o in zip(place, self.strides, hit, strict=True)))
        return found

    @property
    def mixed(self) -> bool:
        """Whether most outputs move."""
        return any(float(self._sizes(change).median()) > self.noise for change in self.changes.values())

    def less(self, still: Moves) -> Moves:
        """Return what moves more than without the filter: what stands beside it, and does not depend on it, is gone."""
        return replace(self, changes={place: change - still.changes[place] for place, change in self.changes.items()})

    def _sizes(self, change: Tensor) -> Tensor:
        return change.abs().flatten(len(self.strides)).amax(-1)


def moves(
    twin: nn.Module, call: Call, axes: tuple[int, ...], filters: Tensor, strides: Sequence[int], tap: int | None
) -> Moves:
    """Return what moves in a copy with weight on one tap, or on none.

    Raises:
        CannotRunError: it does not run on the input, or gives no positions of the same resolution.
    """
    filters.zero_()
    if tap is not None:
        filters.flatten(1)[:, tap] = 1.0
    x, front = call.args[0], tuple(range(len(axes)))
    base = run(twin, call)[0]
    if base.ndim != x.ndim or any(base.shape[axis] < 2 for axis in axes):
        raise CannotRunError("its output has no such axis of positions")
    sizes = [(x.shape[axis], base.shape[axis]) for axis in axes]
    # A kernel without padding leaves more than half of what ``maps`` makes.
    bounds = [
        (taken // (2 * stride) + 1, 2 * taken // stride) for (taken, _), stride in zip(sizes, strides, strict=True)
    ]
    if not all(least < given < most for (_, given), (least, most) in zip(sizes, bounds, strict=True)):
        raise CannotRunError("its output has positions of another resolution")
    keeps = all(taken == given * stride for (taken, given), stride in zip(sizes, strides, strict=True))
    at = [x.shape[axis] // 2 // stride * stride for axis, stride in zip(axes, strides, strict=True)]
    changes = dict[tuple[int, ...], Tensor]()
    # With a stride, only some inputs are met by this tap: all of one cell are tried.
    for inside in itertools.product(*(range(stride) for stride in strides)):
        place = tuple(start + step for start, step in zip(at, inside, strict=True))
        moved = x.clone()
        # Every channel by another amount: a norm before the convolution takes away what all have in common.
        features = moved.movedim(axes, front)[place]
        features += torch.randn(features.shape, generator=torch.Generator().manual_seed(4), dtype=x.dtype)
        changes[place] = (run(twin, replace(call, args=(moved,)))[0] - base).movedim(axes, front)
    return Moves(changes, tuple(strides), 1e-9 * float(base.abs().max()), keeps)
