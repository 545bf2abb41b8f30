"""What a training function of a user's own is known by: its code, the values that it carries, its constants."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import espalier
from espalier.errors import EspalierError
from espalier.study.own_training import OwnTraining


def train(arm: str, lr: float, seed: int, folder: Path) -> float:
    return lr


@pytest.mark.parametrize(
    "made", [lambda: train, lambda: functools.partial(train), lambda: Callable_(), lambda: Callable_().method]
)
def test_every_kind_of_callable_has_a_name_and_the_code_behind_it(made: Callable[[], Any]) -> None:
    one, two = OwnTraining.of(made()), OwnTraining.of(made())
    assert one == two
    assert one.name


def options(arm: str, lr: float, seed: int, folder: Path, data: Any = None) -> float:
    return 0.0


def closure(depth: Any) -> Callable[..., float]:
    def inner(arm: str, lr: float, seed: int, folder: Path) -> float:
        return 0.0 * depth

    return inner


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (functools.partial(options, data=[1]), functools.partial(options, data=[2]), False),
        (functools.partial(options, data=1), functools.partial(options, data=2), False),
        (closure(1), closure(1), True),
        (closure(1), closure(2), False),
        (closure((1, "a")), closure((1, "b")), False),
        (closure([1]), closure([2]), False),
    ],
)
def test_values_that_a_callable_carries_are_part_of_it(one: Any, other: Any, same: bool) -> None:
    assert (OwnTraining.of(one) == OwnTraining.of(other)) is same


EPOCHS, SIZES, TABLE, COUNT = 1, (1, 2), [1], 0


def names_constants(arm: str, lr: float, seed: int, folder: Path) -> float:
    def inside() -> float:
        return float(EPOCHS)

    return inside() * SIZES[0] * TABLE[0]


def counts_its_calls(arm: str, lr: float, seed: int, folder: Path) -> float:
    global COUNT
    COUNT += 1
    return float(COUNT)


class NamesConstants:
    def helper(self) -> float:
        return float(EPOCHS)

    def __call__(self, arm: str, lr: float, seed: int, folder: Path) -> float:
        return self.helper()


@pytest.mark.parametrize(
    ("made", "name", "value", "same"),
    [
        (lambda: names_constants, "EPOCHS", 9, False),  # read by a function inside it
        (lambda: names_constants, "SIZES", (1, 3), False),
        (lambda: names_constants, "TABLE", [2], False),
        (lambda: functools.partial(names_constants), "EPOCHS", 9, False),
        (NamesConstants, "EPOCHS", 9, False),
        (lambda: NamesConstants().__call__, "SIZES", (9,), True),  # not named there
        (lambda: options, "EPOCHS", 9, True),
        (lambda: counts_its_calls, "COUNT", 3, False),  # where its counter starts
    ],
)
def test_constants_of_the_module_that_a_function_names_are_part_of_it(
    monkeypatch: pytest.MonkeyPatch, made: Callable[[], Any], name: str, value: Any, same: bool
) -> None:
    before = OwnTraining.of(made())
    monkeypatch.setitem(globals(), name, value)
    assert (OwnTraining.of(made()) == before) is same


def test_another_constant_does_not_extend_a_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    espalier.compare(names_constants, arms=["a"], lrs=[0.1], seeds=1, out=tmp_path / "s", workers=0)
    monkeypatch.setitem(globals(), "EPOCHS", 9)
    with pytest.raises(EspalierError, match="holds another study: its training has changed in EPOCHS;"):
        espalier.compare(names_constants, arms=["a"], lrs=[0.1], seeds=2, out=tmp_path / "s", workers=0)


def test_attributes_of_an_object_are_part_of_it() -> None:
    one, other = Callable_(), Callable_()
    other.depth = 3
    assert OwnTraining.of(one.method) != OwnTraining.of(other.method)
    assert OwnTraining.of(one) != OwnTraining.of(other)


class Callable_:
    depth = 1

    def __call__(self, arm: str, lr: float, seed: int, folder: Path) -> float:
        return 0.0

    def method(self, arm: str, lr: float, seed: int, folder: Path) -> float:
        return 1.0
