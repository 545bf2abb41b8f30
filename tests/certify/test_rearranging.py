"""Operations that only move numbers: the constant is the norm of the map, and what mixes images is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from espalier.certify import UncertifiableError, lipschitz_bound
from tests.certify.test_counts import Runs

AXES = st.integers(-4, 3)
PADS = st.lists(st.integers(-1, 2), min_size=4, max_size=4)
MOVES: dict[str, st.SearchStrategy[Callable[[Tensor], Any]]] = {
    "permute": st.permutations(range(4)).map(lambda order: lambda x: x.permute(order)),
    "transpose": st.tuples(AXES, AXES).map(lambda pair: lambda x: x.transpose(*pair)),
    "movedim": st.tuples(AXES, AXES).map(lambda pair: lambda x: x.movedim(*pair)),
    "squeeze": AXES.map(lambda dim: lambda x: x.squeeze(dim)),
    "unsqueeze": AXES.map(lambda dim: lambda x: x.unsqueeze(dim)),
    "flatten": st.tuples(AXES, AXES).map(lambda pair: lambda x: x.flatten(*pair)),
    "reshape": st.sampled_from([(-1,), (1, -1), (-1, 4), (2, -1)]).map(lambda shape: lambda x: x.reshape(shape)),
    "narrow": st.tuples(AXES, st.integers(0, 1)).map(lambda pair: lambda x: x.narrow(*pair, 1)),
    "select": st.tuples(AXES, st.integers(0, 1)).map(lambda pair: lambda x: x.select(*pair)),
    "flip": st.lists(AXES, max_size=2).map(lambda dims: lambda x: x.flip(dims)),
    "roll": st.tuples(st.integers(-3, 3), st.one_of(st.none(), AXES)).map(lambda pair: lambda x: x.roll(*pair)),
    "repeat": st.lists(st.integers(1, 3), min_size=4, max_size=4).map(lambda counts: lambda x: x.repeat(counts)),
    "chunk": st.tuples(st.integers(1, 3), AXES).map(lambda pair: lambda x: x.chunk(*pair)[-1]),
    "split": st.tuples(st.integers(1, 2), AXES).map(lambda pair: lambda x: x.split(*pair)[0]),
    "unbind": AXES.map(lambda dim: lambda x: x.unbind(dim)[0]),
    "index": st.sampled_from([(slice(1),), (slice(None), 0), (..., slice(1, None)), (slice(None), [1, 0, 1]), (None,)])
    .map(lambda index: lambda x: x[index]),
    "index_select": st.tuples(AXES, st.lists(st.integers(0, 1), min_size=1, max_size=4))
    .map(lambda pair: lambda x: x.index_select(pair[0], torch.tensor(pair[1]))),
    "shuffle": st.sampled_from([F.pixel_shuffle, F.pixel_unshuffle, F.channel_shuffle])
    .map(lambda shuffle: lambda x: shuffle(x, 2)),
    "pad": st.tuples(PADS, st.sampled_from(["constant", "reflect", "replicate", "circular"]))
    .map(lambda pair: lambda x: F.pad(x, *pair)),
}  # fmt: skip


@settings(max_examples=250, deadline=None)
@given(
    move=st.one_of(*MOVES.values()),
    shape=st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 4]), st.integers(1, 4), st.integers(1, 4)),
)
@example(move=lambda x: F.pad(x, [-1, 2, 0, 0], "circular"), shape=(1, 1, 2, 2))
def test_a_move_is_bounded_by_its_norm_or_refused(move: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
    x = torch.rand(shape, dtype=torch.float64)
    try:
        claimed = lipschitz_bound(Runs(move), x)
    except UncertifiableError:
        return
    y = move(x)
    assert len(y) == len(x)
    if not y.numel():
        return
    # By differences, exact for what only moves numbers: torch's own gradient of circular padding that cuts one side and
    # wraps the other more than once leaves copies out.
    zero, units = torch.zeros_like(x), torch.eye(x.numel(), dtype=x.dtype).view(-1, *shape)
    columns = torch.stack([(move(zero + unit) - move(zero)).flatten() for unit in units], dim=1)
    jacobian = columns.reshape(len(x), y[0].numel(), len(x), x[0].numel())
    for image in range(len(x)):
        others = [other for other in range(len(x)) if other != image]
        assert not jacobian[image, :, others].any()
        norm = torch.linalg.matrix_norm(jacobian[image, :, image], 2).item()
        assert claimed == pytest.approx(norm, rel=1e-12) or norm == 0


@pytest.mark.parametrize("images", [1, 2, 5])
@pytest.mark.parametrize(
    "move",
    [
        lambda x: x[:1], lambda x: x.flip(0), lambda x: x.roll(1, 0), lambda x: x.roll(1),
        lambda x: x.roll(2, 0) if len(x) > 2 else x.flip(0), lambda x: x.chunk(2)[0] if len(x) > 1 else x[:0],
        lambda x: x.transpose(0, 1),
        lambda x: x.repeat(2, 1, 1, 1), lambda x: x.index_select(0, torch.zeros(len(x), dtype=torch.long)),
        lambda x: x.flatten(), lambda x: x[0], lambda x: x.unsqueeze(0), lambda x: x.unbind(0)[0],
    ],
)  # fmt: skip
def test_a_move_along_the_batch_is_refused_however_many_images_there_are(
    move: Callable[[Tensor], Tensor], images: int
) -> None:
    with pytest.raises(UncertifiableError, match="images would meet"):
        lipschitz_bound(Runs(move), torch.rand(images, 4, 2, 2))


def test_moves_that_leave_the_batch_alone_are_bounded() -> None:
    x = torch.rand(2, 4, 2, 2)
    for move, constant in (
        (lambda x: x.flatten(1), 1.0),
        (lambda x: x[:, [0, 0, 0]], 3**0.5),
        (lambda x: x.expand(x.shape[0], 4, 2, 2), 1.0),
        (lambda x: F.pad(x, (1, 1, 0, 0), "replicate"), 2**0.5),
        (lambda x: F.pad(x, (1, 1, 1, 1), value=3.0), 1.0),
    ):
        assert lipschitz_bound(Runs(move), x) == pytest.approx(constant)
