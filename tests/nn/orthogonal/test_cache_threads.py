"""One layer, many threads: every result belongs to one state of the parameters, and none outlives it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from espalier.nn import CayleyConv2d, CayleyConvTranspose2d
from espalier.nn.orthogonal.spectrum.cache import OperatorCache


@torch.no_grad()
def test_six_threads_and_eight_image_sizes_give_what_one_thread_gives() -> None:
    torch.manual_seed(0)
    layer = CayleyConv2d(3, 4, 3).eval()
    images = [torch.rand(2, 3, side, side + 1) for side in range(3, 11)]
    expected = [copy.deepcopy(layer)(x) for x in images]
    start = threading.Barrier(6)

    def work(first: int) -> list[Tensor]:
        start.wait()
        return [layer(images[(first + i) % 8]) for i in range(40)]

    with ThreadPoolExecutor(6) as pool:
        for first, results in enumerate(pool.map(work, range(6))):
            for i, y in enumerate(results):
                assert torch.allclose(y, expected[(first + i) % 8], atol=1e-6)


@torch.no_grad()
def test_a_write_while_an_operator_is_built_leaves_nothing_stale() -> None:
    cache, weight = OperatorCache(), torch.ones(2)

    def build(value: Tensor) -> Tensor:
        weight.fill_(5.0)  # as another thread may, at the worst moment
        return value.clone()

    first = cache.get("size", (weight,), build, torch.float32)
    assert first.tolist() == [1.0, 1.0]  # of the state that was copied
    assert cache.get("size", (weight,), lambda value: value.clone(), torch.float32).tolist() == [5.0, 5.0]


@pytest.mark.parametrize(
    ("change", "shape"),
    [
        (lambda layer: setattr(layer, "dilation", (2, 2)), (1, 4, 6, 6)),
        (lambda layer: setattr(layer, "padding_mode", "zeros"), (1, 4, 6, 6)),
    ],
)
@torch.no_grad()
def test_an_attribute_that_shapes_the_operator_is_part_of_its_key(
    change: Callable[[Any], None], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    for kind in (CayleyConv2d, CayleyConvTranspose2d):
        layer, x = kind(4, 4, 3).eval(), torch.rand(shape)
        before = layer(x)
        change(layer)
        after = layer(x)
        assert not torch.allclose(before, after, atol=1e-3)
        assert torch.allclose(after, copy.deepcopy(layer)(x), atol=1e-6)


def test_a_layer_with_a_cache_is_still_copied_and_pickled() -> None:
    import pickle

    layer = CayleyConv2d(2, 2, 3).eval()
    x = torch.rand(1, 2, 4, 4)
    y = layer(x)
    assert torch.allclose(copy.deepcopy(layer)(x), y)
    assert torch.allclose(pickle.loads(pickle.dumps(layer))(x), y)
