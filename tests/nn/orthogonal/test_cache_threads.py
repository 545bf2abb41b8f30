"""One layer, many threads: every result belongs to one state of the parameters, and none outlives it."""

from __future__ import annotations

import copy
import threading
import time
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


class SlowKey:
    """A key that gives other threads time whenever it is looked up."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __hash__(self) -> int:
        time.sleep(1e-3)
        return hash(self.number)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SlowKey) and self.number == other.number


@torch.no_grad()
def test_threads_that_evict_each_other_s_entries_do_not_collide() -> None:
    cache, weight, keys = OperatorCache(), torch.ones(1), [SlowKey(number) for number in range(8)]

    def work(first: int) -> list[float]:
        some = [keys[(first + i) % 8] for i in range(8)]
        made = [cache.get(key, (weight,), lambda w, key=key: w * key.number, torch.float32).item() for key in some]
        return [value - key.number for value, key in zip(made, some, strict=True)]

    with ThreadPoolExecutor(6) as pool:
        assert all(differences == [0.0] * 8 for differences in pool.map(work, range(6)))


@torch.no_grad()
def test_a_write_while_an_operator_is_built_leaves_nothing_stale() -> None:
    cache, weight = OperatorCache(), torch.ones(2)
    building, written = threading.Event(), threading.Event()

    def slow(value: Tensor) -> Tensor:
        building.set()
        written.wait(1.0)
        return value.clone()

    def get(key: str, build: Callable[[Tensor], Tensor]) -> list[float]:
        found: list[float] = cache.get(key, (weight,), build, torch.float32).tolist()
        return found

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(get, "one size", slow)
        building.wait()
        weight.fill_(5.0)
        second = pool.submit(get, "another", Tensor.clone)
        threading.Timer(0.2, written.set).start()
        assert first.result() == [1.0, 1.0]
        assert second.result() == [5.0, 5.0]
    assert get("one size", Tensor.clone) == [5.0, 5.0]


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
