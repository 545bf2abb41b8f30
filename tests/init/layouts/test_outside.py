"""Reading a model leaves nothing behind in its code: caches, lists, counters, generators, objects that copies share."""

from __future__ import annotations

import functools
import os
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import espalier
from espalier.errors import EspalierError
from espalier.init.layouts.verdicts import KNOWN

SEEN: list[Tensor] = []
LAST: deque[int] = deque(maxlen=3)
TABLES: dict[int, Tensor] = {}
NAMES: set[str] = set()
DRAWN, RANDOM = torch.Generator().manual_seed(3), np.random.default_rng(3)
OLDER, PYTHON = np.random.RandomState(3), random.Random(3)
COUNT = 0


@functools.cache
def positions(length: int) -> Tensor:
    return torch.linspace(0, 1, length)[:, None]


class Controller:
    def __init__(self) -> None:
        self.maps: list[Tensor] = []

    def __deepcopy__(self, memo: Any) -> Controller:
        return self


class Leaving(nn.Module):
    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.controller = 2, Controller()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(32, 32, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        global COUNT
        q, k, v = (part(x).unflatten(-1, (2, 16)).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj))
        weights = (q @ k.mT / 4).softmax(-1)
        COUNT += 1
        type(self).calls += 1
        SEEN.append(weights)
        LAST.append(COUNT)
        NAMES.add(str(COUNT))
        TABLES.setdefault(x.shape[1], torch.arange(x.shape[1], dtype=x.dtype))
        self.controller.maps.append(weights)
        torch.rand(1, generator=DRAWN)
        RANDOM.random(), OLDER.rand(), PYTHON.random()
        os.environ["ESPALIER_LEFT"] = "by a forward pass"
        torch.set_num_threads(3)
        torch.use_deterministic_algorithms(True)
        out = self.o_proj((weights @ v).transpose(1, 2).flatten(2))
        return torch.as_tensor(out + 0 * positions(64)[: x.shape[1]])


@pytest.mark.parametrize("read", [espalier.structure_, espalier.audit, espalier.diagnose])
def test_reading_leaves_nothing_outside_of_a_model(read: Callable[[nn.Module], object]) -> None:
    KNOWN.clear()
    model, threads = Leaving(), torch.get_num_threads()
    model(torch.rand(1, 5, 32))
    kept = [[*SEEN], [*LAST], {**TABLES}, {*NAMES}, COUNT, Leaving.calls, [*model.controller.maps]]
    os.environ.pop("ESPALIER_LEFT")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(False)
    states, table = (DRAWN.get_state(), RANDOM.bit_generator.state), positions(64)
    others = str(OLDER.get_state()), PYTHON.getstate()
    read(model)
    assert "ESPALIER_LEFT" not in os.environ
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == (1, False)
    assert (str(OLDER.get_state()), PYTHON.getstate()) == others
    now = [SEEN, [*LAST], TABLES, NAMES, COUNT, Leaving.calls, model.controller.maps]
    assert [len(part) if isinstance(part, list | dict | set) else part for part in now] == [
        len(part) if isinstance(part, list | dict | set) else part for part in kept
    ]
    assert all(a is b for a, b in zip(SEEN, kept[0], strict=True))
    assert torch.equal(DRAWN.get_state(), states[0])
    assert RANDOM.bit_generator.state == states[1]
    assert positions(64).dtype == table.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in TABLES.values())
    try:
        assert model(torch.rand(1, 6, 32)).dtype == torch.float32
    finally:
        os.environ.pop("ESPALIER_LEFT", None)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)


def test_a_cache_that_is_empty_is_empty_again() -> None:
    KNOWN.clear()
    positions.cache_clear()
    report = espalier.structure_(Leaving(), generator=torch.Generator().manual_seed(0))
    assert [row.status for row in report.layers] == ["written"]
    assert positions.cache_info().currsize == 0


def test_a_forward_pass_that_ends_the_program_ends_its_own_run_alone() -> None:
    class Ending(Leaving):
        def forward(self, x: Tensor) -> Tensor:
            raise SystemExit(3)

    with pytest.raises(EspalierError, match=r"cannot be run to prove its rows.*SystemExit: 3"):
        espalier.structure_(Ending())
