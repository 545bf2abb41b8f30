"""Verdicts are kept only while all that decides them is as it was, and the run that finds them leaves no trace."""

from __future__ import annotations

import os
import random
import types
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import espalier
from espalier.errors import EspalierError
from espalier.init.layouts.keys import module_key

DIM, HEADS = 24, 4
HELPERS = types.ModuleType("helpers")
SETTINGS: dict[str, Any] = {"order": ["qkv"]}


def inner(parts: list[Tensor]) -> list[Tensor]:
    return parts


HELPERS.inner = inner  # type: ignore[attr-defined]


def ordered(parts: list[Tensor]) -> list[Tensor]:
    named = dict(zip("qkv", inner(HELPERS.inner(parts)), strict=True))
    return [part for part in (named[name] for name in SETTINGS["order"][0])]  # noqa: C416 (a scope within)


class Attention(nn.Module):
    """Self-attention whose rows are in the order that helpers of its module give."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        parts = [part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)]
        [q, k, v] = [each for each in ordered(parts)]  # noqa: C416
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def backwards(parts: list[Tensor]) -> list[Tensor]:
    return parts[::-1]


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setitem(globals(), "inner", backwards),
        lambda patch: patch.setattr(HELPERS, "inner", backwards),
        lambda patch: patch.setitem(SETTINGS, "order", ["vkq"]),
        lambda patch: SETTINGS["order"].__setitem__(0, "vkq"),
        lambda patch: patch.setitem(globals(), "ordered", backwards),
    ],
)
def test_what_a_layer_calls_counts_as_deep_as_it_goes(
    change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SETTINGS, "order", ["qkv"])
    assert module_key(Attention()) == module_key(Attention())
    espalier.structure_(Attention())
    before = module_key(Attention())
    change(monkeypatch)
    assert module_key(Attention()) != before
    with pytest.raises(EspalierError, match="not proven by a run"):
        espalier.structure_(Attention())


def test_no_generator_shows_that_a_layer_was_run() -> None:
    class Drawing(Attention):
        def forward(self, x: Tensor) -> Tensor:
            noise = random.random() + np.random.rand() + torch.rand(())  # noqa: NPY002
            return super().forward(x) + noise

    layer = Drawing()
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    [row] = espalier.structure_(layer, generator=torch.Generator().manual_seed(0)).layers
    assert row.status == "written"
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002


@pytest.mark.parametrize("need_weights", [True, False])
def test_torch_s_own_function_is_run_product_by_product(need_weights: bool) -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads = HEADS
            self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(DIM, DIM) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            maps = (self.q_proj, self.k_proj, self.v_proj)
            tokens, bias = x.transpose(0, 1), torch.cat([each.bias for each in maps])
            out = F.multi_head_attention_forward(
                tokens, tokens, tokens, DIM, HEADS, None, bias, None, None, False, 0.0, self.out_proj.weight,
                self.out_proj.bias, need_weights=need_weights, use_separate_proj_weight=True,
                q_proj_weight=maps[0].weight, k_proj_weight=maps[1].weight, v_proj_weight=maps[2].weight,
            )  # fmt: skip
            return out[0].transpose(0, 1)

    [row] = espalier.structure_(Functional()).layers
    assert row.status == "written"


class Chosen:
    order = "qkv"


class Held:
    def __init__(self) -> None:
        self.order = "qkv"


ARGUMENTS, HELD = Namespace(order="qkv"), Held()


class Read(Attention):
    """Its order of rows stands where a program keeps settings."""

    chosen: Any = Chosen

    def order(self) -> str:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        parts = dict(zip(self.order(), self.qkv(x).chunk(3, -1), strict=True))
        q, k, v = (parts[name].unflatten(-1, (HEADS, -1)).transpose(1, 2) for name in "qkv")
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class OfClass(Read):
    def order(self) -> str:
        return Chosen.order


class OfItsOwnClass(Read):
    def order(self) -> str:
        return self.chosen.order


class OfArguments(Read):
    def order(self) -> str:
        return ARGUMENTS.order


class OfObject(Read):
    def order(self) -> str:
        return HELD.order


class OfEnvironment(Read):
    def order(self) -> str:
        return os.environ.get("ROW_ORDER", "qkv")


@pytest.mark.parametrize(
    ("layer", "change"),
    [
        (OfClass, lambda patch: patch.setattr(Chosen, "order", "vkq")),
        (OfItsOwnClass, lambda patch: patch.setattr(Chosen, "order", "vkq")),
        (OfArguments, lambda patch: patch.setattr(ARGUMENTS, "order", "vkq")),
        (OfObject, lambda patch: patch.setattr(HELD, "order", "vkq")),
        (OfEnvironment, lambda patch: patch.setenv("ROW_ORDER", "vkq")),
    ],
)
def test_settings_count_wherever_a_program_keeps_them(
    layer: type[Read], change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert module_key(layer()) == module_key(layer())
    espalier.structure_(layer())
    change(monkeypatch)
    with pytest.raises(EspalierError, match="not proven by a run"):
        espalier.structure_(layer())
