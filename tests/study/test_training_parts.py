"""What a training is known by: whatever of it is changed is noticed, what it does not use is not, in every process."""

from __future__ import annotations

import importlib.util
import itertools
import json
import linecache
import logging
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from other_processes import parts_in_new_processes

import espalier
from espalier.errors import EspalierError
from espalier.recipes import get_recipe
from espalier.study.code_names import source_of
from espalier.study.own_training import OwnTraining
from espalier.study.training_parts import training_parts
from espalier.study.trial import save_study

NUMBER = itertools.count()
HELPERS = "def width():\n    return 8\n\nclass Net:\n    depth = 2\n    def forward(self):\n        return self.depth\n"
MAIN = """
import contextlib
import enum
import functools
import types
from dataclasses import dataclass, field

import numpy as np
import torch
import {helpers} as helpers
from {helpers} import Net

CONFIG = {{"width": 8, "rates": [0.1, {{"warm": 2}}]}}
NAMES = {{"a", "b"}}
DATA = torch.arange(6.0).reshape(2, 3)
ARRAY = np.arange(4)
OPTIONS = types.SimpleNamespace(dropout=0.1)
UNUSED = 1
CACHE = {{}}
LOG = []
calls = 0

class Kind(enum.Enum):
    ONE = 1

KIND = Kind.ONE
RELU, SINE = torch.relu, np.sin

class Names(list):
    def first(self):
        return self[0]

NAMED = Names([1])

class Slotted:
    __slots__ = ("depth",)
    def __init__(self):
        self.depth = 5

SLOTTED = Slotted()

@functools.cache
def cached():
    return "cached"

@contextlib.contextmanager
def manager():
    yield "managed"

@torch.no_grad()
def graded():
    return "graded"

COMPILED = torch.func.vmap(lambda x: x * 7)

@dataclass
class Settings:
    epochs: int = 3
    sizes: list = field(default_factory=lambda: [1, 2])

SETTINGS = Settings()

class Base:
    def head(self):
        return 1

class Model(Base):
    scale = 2.0

    def __init__(self):
        self.width = 4
        self.seen = []

    @property
    def size(self):
        return self.width * 3

    def forward(self):
        self.seen.append(1)
        return self.head()

MODEL = Model()

def decorate(function):
    @functools.wraps(function)
    def run(*args):
        return function(*args) + 1
    return run

@decorate
def deep():
    return 0.5

def build():
    assert list(torch.nn.Identity().eval().modules())
    return deep() + helpers.width() + Net().forward() + MODEL.size + MODEL.forward()

def unused():
    return 1

def loader():
    import {late}
    return {late}.VALUE

def train(arm, lr, seed, folder, steps=CONFIG["width"]):
    global calls
    calls += 1
    CACHE[arm] = LOG.append(arm)
    used = CONFIG, NAMES, DATA, ARRAY, OPTIONS, KIND, SETTINGS, RELU, SINE, NAMED, SLOTTED, COMPILED
    used += cached, manager, graded
    return build() + len(used) + loader()
"""
LATE = "VALUE = 1\n"


def load(folder: Path, main: str = MAIN, helpers: str = HELPERS, late: str = LATE) -> ModuleType:
    """Import the files as fresh modules; their names are the same length, and no part of what is compared."""
    here = folder / f"v{next(NUMBER)}"
    here.mkdir()
    names = {"helpers": "helpers_of_training", "late": "late_of_training"}
    for name, text in (("helpers_of_training", helpers), ("late_of_training", late), ("main_of_training", main)):
        (here / f"{name}.py").write_text(text.format(**names) if name == "main_of_training" else text)
    for name in (*names.values(), "main_of_training"):
        sys.modules.pop(name, None)
    sys.path.insert(0, str(here))
    importlib.invalidate_caches()
    try:
        module = importlib.import_module("main_of_training")
        module.PARTS = training_parts(module.train)  # while its modules are found
    finally:
        sys.path.remove(str(here))
    return module


CHANGES = {
    "a helper": (MAIN, "return 0.5", "return 0.25"),
    "its caller": (MAIN, "+ helpers.width()", "- helpers.width()"),
    "the decorator": (MAIN, "(*args) + 1", "(*args) + 2"),
    "a number in a dict": (MAIN, '"width": 8', '"width": 9'),
    "a dict in a list in a dict": (MAIN, '"warm": 2', '"warm": 3'),
    "a set": (MAIN, '{{"a", "b"}}', '{{"a", "c"}}'),
    "a tensor": (MAIN, "arange(6.0)", "arange(1.0, 7.0)"),
    "its shape": (MAIN, "reshape(2, 3)", "reshape(3, 2)"),
    "an array": (MAIN, "np.arange(4)", "np.arange(1, 5)"),
    "a namespace": (MAIN, "dropout=0.1", "dropout=0.2"),
    "a member of an enumeration": (MAIN, "ONE", "TWO"),
    "its value": (MAIN, "ONE = 1", "ONE = 2"),
    "which function of torch": (MAIN, "torch.relu", "torch.tanh"),
    "which function of numpy": (MAIN, "np.sin", "np.cos"),
    "a method of a list of its own kind": (MAIN, "self[0]", "self[-1]"),
    "an attribute in a slot": (MAIN, "self.depth = 5", "self.depth = 6"),
    "a cached function": (MAIN, '"cached"', '"kept"'),
    "a context": (MAIN, '"managed"', '"meant"'),
    "a decorated function": (MAIN, '"graded"', '"grown"'),
    "a function inside a library's": (MAIN, "x * 7", "x * 8"),
    "a field of a dataclass": (MAIN, "Settings()", "Settings(epochs=4)"),
    "its list": (MAIN, "lambda: [1, 2]", "lambda: [1, 3]"),
    "an attribute": (MAIN, "self.width = 4", "self.width = 5"),
    "a class's attribute": (MAIN, "scale = 2.0", "scale = 3.0"),
    "a property": (MAIN, "self.width * 3", "self.width * 4"),
    "a base class": (MAIN, "return 1\n\nclass Model", "return 2\n\nclass Model"),
    "a function of another file": (HELPERS, "return 8", "return 9"),
    "a class of another file": (HELPERS, "return self.depth", "return -self.depth"),
    "its attribute": (HELPERS, "depth = 2", "depth = 3"),
    "a file imported in the function": (LATE, "1", "2"),
    "a dict that is filled": (MAIN, "CACHE = {{}}", 'CACHE = {{"default": 1}}'),
    "a list that grows": (MAIN, "LOG = []", 'LOG = ["default"]'),
    "a number that counts": (MAIN, "calls = 0", "calls = 3"),
    "an alias of a library's function": (MAIN, "import functools", "import functools, math"),
}


@pytest.mark.parametrize("change", sorted(CHANGES))
def test_whatever_the_training_uses_is_part_of_it(change: str, tmp_path: Path) -> None:
    text, old, new = CHANGES[change]
    assert text.count(old) >= 1
    files = {MAIN: "main", HELPERS: "helpers", LATE: "late"}
    other = load(tmp_path, **{files[text]: text.replace(old, new)})
    same = change == "an alias of a library's function"  # an import that nothing names
    assert (load(tmp_path).PARTS == other.PARTS) is same


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("UNUSED = 1", "UNUSED = 2"),
        ("def unused():\n    return 1", "def unused():\n    return 2"),
        ("self.seen = []", "self.seen = []  # what was seen"),
    ],
)
def test_what_it_does_not_use_is_no_part_of_it(old: str, new: str, tmp_path: Path) -> None:
    before, after = load(tmp_path).PARTS, load(tmp_path, MAIN.replace(old, new)).PARTS
    differing = {name for name, _ in before.items() ^ after.items()}
    assert differing <= {"Model.__init__"}  # whose text has another comment in the last case


def test_a_training_that_has_run_is_what_it_was_until_it_is_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load(tmp_path)
    monkeypatch.syspath_prepend(str(Path(module.__file__ or "").parent))
    plan: dict[str, Any] = {"arms": ["a"], "lrs": [0.1], "out": tmp_path / "s", "workers": 0}
    for seeds in (1, 2, 3):
        espalier.compare(module.train, seeds=seeds, **plan)
        assert module.calls == len(module.LOG) == len(module.MODEL.seen) == seeds
    module.CONFIG["width"] = 9
    with pytest.raises(EspalierError, match=r"its training has changed in .*CONFIG"):
        espalier.compare(module.train, seeds=4, **plan)


def test_every_process_finds_the_same(tmp_path: Path) -> None:
    module = load(tmp_path)
    folder = Path(module.__file__ or "").parent
    assert parts_in_new_processes(folder, "main_of_training") == [module.PARTS] * 2


LOOP: list[Any] = []
LOOP.append(LOOP)


def test_where_a_training_writes_to_is_no_part_of_it(tmp_path: Path) -> None:
    one, other = (logging.FileHandler(tmp_path / place) for place in ("a", "b"))
    assert training_parts(bound(one)) == training_parts(bound(other))
    # What stands beside an outlet counts as ever.
    assert training_parts(bound({"log": one, "width": 8})) != training_parts(bound({"log": one, "width": 9}))
    one.close()
    other.close()


def test_a_long_chain_of_functions_is_followed_to_its_end() -> None:
    def made(end: int) -> Any:
        space: dict[str, Any] = {"__name__": "__main__"}
        exec("\n".join(f"def f{n}(): return f{n + 1}()" for n in range(3000)), space)
        exec(f"def f3000(): return {end}\ndef train(arm, lr, seed, folder): return f0()", space)
        return space["train"]

    one, other = training_parts(made(1)), training_parts(made(2))
    assert {name for name, _ in one.items() ^ other.items()} == {"f3000"}


def test_a_file_that_is_being_edited_has_no_source(tmp_path: Path) -> None:
    module = load(tmp_path)
    train = next(line for line, text in enumerate(MAIN.splitlines()) if text.startswith("def train"))
    Path(module.__file__ or "").write_text("\n" * train + 'def train(:\n    """\n')
    linecache.clearcache()
    source_of.cache_clear()
    assert {"train", "build", "CONFIG"} <= training_parts(module.train).keys()


def test_code_without_a_source_is_told_apart_by_what_it_does() -> None:
    def made(test: str) -> Any:
        space: dict[str, Any] = {"__name__": "__main__"}
        exec(f"def train(arm, lr, seed, folder):\n    return float(arm in {test})", space)
        return space["train"]

    assert training_parts(made("{'a', 'b'}")) == training_parts(made("{'b', 'a'}"))
    assert training_parts(made("{'a', 'b'}")) != training_parts(made("{'a', 'c'}"))


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
values = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)


def bound(value: Any) -> Callable[..., float]:
    def train(arm: str, lr: float, seed: int, folder: Path) -> float:
        return float(value is not None)

    return train


@settings(max_examples=60, deadline=None)
@given(values, values)
def test_two_values_are_one_part_only_if_they_are_equal(one: Any, other: Any) -> None:
    # JSON tells 1 from 1.0 and True, as Python's equality does not, and 0.0 from -0.0.
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (training_parts(bound(one)) == training_parts(bound(other))) is same


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(2, dtype=torch.bfloat16),
        torch.tensor(1.0),
        torch.empty(0),
        torch.ones(2, device="meta"),
        torch.eye(2).to_sparse(),
        torch.ones(2, dtype=torch.complex64).conj(),
        torch.nn.LazyLinear(2),
        np.array([object()]),
        np.zeros((2, 3))[:, ::2],
        object(),
        sys.stdout,
        LOOP,
    ],
    ids=[str(number) for number in range(12)],
)
def test_any_object_may_be_bound(value: Any) -> None:
    assert training_parts(bound(value)) == training_parts(bound(value))


def test_a_refusal_names_what_has_changed_and_its_trials_can_be_kept(tmp_path: Path) -> None:
    plan: dict[str, Any] = {"arms": ["a"], "lrs": [0.1], "out": tmp_path / "s", "workers": 0}
    before = espalier.compare(bound({"width": 8}), seeds=1, **plan)
    with pytest.raises(EspalierError, match=r"its training has changed in value; say keep_trials=True .* or choose"):
        espalier.compare(bound({"width": 9}), seeds=2, **plan)
    kept = espalier.compare(bound({"width": 9}), seeds=2, keep_trials=True, **plan)
    assert [trial.finished for trial in kept.study.trials()] == [True] * 2
    assert isinstance(before.study.recipe, OwnTraining)
    assert isinstance(kept.study.recipe, OwnTraining)
    assert kept.study.recipe.code == before.study.recipe.code
    assert kept.study.recipe.parts != before.study.recipe.parts
    assert espalier.compare(bound({"width": 9}), seeds=3, **plan).study.seeds == (0, 1, 2)  # it is its training now
    with pytest.raises(EspalierError, match="its training has changed in value"):
        espalier.compare(bound({"width": 8}), seeds=2, **plan)
    with pytest.raises(EspalierError, match="keep_trials belongs to a training function"):
        espalier.compare(get_recipe("digits_vit"), seeds=2, keep_trials=True, **plan)


def test_a_study_of_an_earlier_version_is_not_taken_for_the_same(tmp_path: Path) -> None:
    plan: dict[str, Any] = {"arms": ["a"], "lrs": [0.1], "seeds": 1, "out": tmp_path / "s", "workers": 0}
    study = espalier.compare(bound(1), **plan).study
    assert isinstance(study.recipe, OwnTraining)
    shutil.rmtree(study.path)
    save_study(replace(study, recipe=OwnTraining(study.recipe.name, "0" * 12, study.recipe.metric, study.recipe.lr)))
    with pytest.raises(EspalierError, match="it was planned by an earlier version"):
        espalier.compare(bound(1), **plan)
