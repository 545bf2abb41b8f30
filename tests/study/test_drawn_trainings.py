"""Trainings drawn from everything that Python holds a number in: whatever number counts in a result is part of them."""

from __future__ import annotations

import importlib
import itertools
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from other_processes import parts_in_new_processes

from espalier.study.training_parts import leave_behind, training_parts

COUNT = itertools.count()
HEAD = """
import abc, collections, contextlib, copy, dataclasses, datetime, decimal, enum, fractions, functools, importlib
import itertools, operator, random, sys, types, typing
import numpy as np
import torch
from torch import nn
"""
# How a number E is put away under the name A, and how the training reads it back. What stands before the bar is run
# when the module is imported, what stands behind it when it trains.
PLACES = {
    "constant": "A = E | A",
    "sum": "A = E + 0 | A",
    "dict": "A = {'k': E} | A['k']",
    "dict that changes": "A = {'k': E}\ndef A_set(): A['lr'] = 1; return A['k'] | A_set()",
    "dict that is updated": "A = {}\nA.update(k=E)\ndef A_set(): A.update(lr=1); return A['k'] | A_set()",
    "list that grows": "A = [E]\ndef A_set(): A.append(0); return A[0] | A_set()",
    "counter": "A = E\ndef A_set(): global A; A += 1; return A | A_set()",
    "tuple": "A = (0, [1, {2: E}]) | A[1][1][2]",
    "frozen set": "A = frozenset({E}) | min(A)",
    "deque": "A = collections.deque([E]) | A[0]",
    "default dict": "A = collections.defaultdict(lambda: E) | copy.copy(A)[0]",
    "kind of default dict": "class A_C(collections.defaultdict): pass\nA = A_C(lambda: E) | copy.copy(A)[0]",
    "ordered dict": "A = collections.OrderedDict(k=E) | A['k']",
    "kind of array": "class A_C(np.ndarray): pass\nA = np.full(2, E).view(A_C) | int(A[0])",
    "kind of fraction": "class A_C(fractions.Fraction): pass\nA = A_C(E) | int(A)",
    "chain of maps": "A = collections.ChainMap({}, {'k': E}) | A['k']",
    "user dict": "class A_D(collections.UserDict): pass\nA = A_D(k=E) | A['k']",
    "counted": "A = collections.Counter(k=E) | A['k']",
    "read-only map": "A = types.MappingProxyType({'k': E}) | A['k']",
    "name space": "A = types.SimpleNamespace(k=E) | A.k",
    "named tuple": "A = collections.namedtuple('A', 'k')(E) | A.k",
    "typed tuple": "class A(typing.NamedTuple):\n    k: int = E\n | A().k",
    "text": "A = str(E) | int(A)",
    "bytes": "A = str(E).encode() | int(A)",
    "complex number": "A = complex(E, 1) | int(A.real)",
    "range": "A = range(E) | len(A)",
    "slice": "A = slice(E) | A.stop",
    "long text": "A = 'x' * 5000 + str(E) | int(A[5000:])",
    "fraction": "A = fractions.Fraction(E, 3) | int(A * 3)",
    "decimal": "A = decimal.Decimal(E) | int(A)",
    "time": "A = datetime.timedelta(days=E) | A.days",
    "numpy number": "A = np.int64(E) | int(A)",
    "array": "A = np.full((2, 2), E) | int(A[1, 1])",
    "array of objects": "A = np.array([{'k': E}, 1], dtype=object) | A[0]['k']",
    "tensor": "A = torch.tensor([1, E]) | int(A[1])",
    "gradient": "A = torch.ones(1, requires_grad=bool(E % 2)) | int(A.requires_grad)",
    "parameter": "A = nn.Parameter(torch.full((2,), float(E))) | int(A[1].item())",
    "generator of numbers": "A = torch.Generator().manual_seed(E) | A.initial_seed()",
    "random numbers": "A = random.Random(E) | int(90 * copy.copy(A).random())",
    "numpy's random numbers": "A = np.random.default_rng(E) | int(90 * copy.deepcopy(A).random())",
    "iterator": "A = iter([E]) | next(copy.copy(A))",
    "function": "def A(): return E | A()",
    "function of functions": "def A_1(): return E\ndef A_2(): return A_1()\ndef A(): return A_2() | A()",
    "default": "def A(x=E): return x | A()",
    "keyword default": "def A(*, x=E): return x | A()",
    "lambda": "A = lambda: E | A()",
    "lambda in a dict": "A = {'f': lambda: E, 'g': lambda: 0} | A['f']()",
    "closure": "def A_of(x):\n    def inner(): return x\n    return inner\nA = A_of(E) | A()",
    "closure that changes": "def A_of(x):\n    state = {'k': x}\n    def inner():\n        state['lr'] = 1\n"
    "        return state['k']\n    return inner\nA = A_of(E) | A()",
    "closure that counts": "def A_of(x):\n    def inner():\n        nonlocal x\n        x += 1\n        return x\n"
    "    return inner\nA = A_of(E) | A()",
    "attribute of a function": "def A(): return A.k\nA.k = E | A()",
    "generator": "def A():\n    yield E\n | next(A())",
    "comprehension": "A = [E] | [x for x in A][0]",
    "match": "def A():\n    match 1:\n        case 1: return E\n | A()",
    "partial": "A = functools.partial(int, E) | A()",
    "partial of one's own": "def A_f(x): return x + E\nA = functools.partial(A_f, 0) | A()",
    "decorator": "def A_d(f):\n    @functools.wraps(f)\n    def run(): return f() + E\n    return run\n"
    "@A_d\ndef A(): return 0 | A()",
    "cached": "@functools.cache\ndef A(): return E | A()",
    "dispatched": "@functools.singledispatch\ndef A(x): return 0\n@A.register\ndef _(x: int): return E | A(1)",
    "context": "@contextlib.contextmanager\ndef A():\n    yield E\ndef A_in():\n    with A() as x: return x | A_in()",
    "executed": "exec('def A(): return ' + str(E)) | A()",
    "class's attribute": "class A: k = E | A.k",
    "class's list": "class A: k = [E]\ndef A_set(): A.k.append(1); return A.k[0] | A_set()",
    "base class": "class A_B: k = E\nclass A(A_B): pass | A.k",
    "super": "class A_B:\n    def f(self): return E\nclass A(A_B):\n    def f(self): return super().f() | A().f()",
    "abstract": "class A_B(abc.ABC):\n    @abc.abstractmethod\n    def f(self): return E\n"
    "class A(A_B):\n    def f(self): return super().f() | A().f()",
    "metaclass": "class A_M(type):\n    def f(cls): return E\nclass A(metaclass=A_M): pass | A.f()",
    "inner class": "class A:\n    class In:\n        k = E\n | A.In.k",
    "made class": "A = type('A', (), {'k': E}) | A.k",
    "attribute": "class A_C:\n    def __init__(self, k): self.k = k\nA = A_C(E) | A.k",
    "attribute that changes": "class A_C:\n    def __init__(self, k): self.k = {'k': k}\n"
    "    def f(self):\n        self.k['lr'] = 1\n        return self.k['k']\nA = A_C(E) | A.f()",
    "attribute that counts": "class A_C:\n    def __init__(self, k): self.k = k\n"
    "    def f(self):\n        self.k += 1\n        return self.k\nA = A_C(E) | A.f()",
    "slot": "class A_C:\n    __slots__ = ('k',)\n    def __init__(self, k): self.k = k\nA = A_C(E) | A.k",
    "private slot": "class A_C:\n    __slots__ = '__k'\n    def __init__(self, k): self.__k = k\n"
    "    def f(self): return self.__k\nA = A_C(E) | A.f()",
    "property": "class A_C:\n    @property\n    def k(self): return E\nA = A_C() | A.k",
    "cached property": "class A_C:\n    @functools.cached_property\n    def k(self): return E\nA = A_C() | A.k",
    "class method": "class A:\n    @classmethod\n    def f(cls): return E\n | A.f()",
    "static method": "class A:\n    @staticmethod\n    def f(): return E\n | A.f()",
    "partial method": "class A_C:\n    def g(self, x): return x\n    f = functools.partialmethod(g, E)\n"
    "A = A_C() | A.f()",
    "descriptor": "class A_D:\n    def __get__(self, *a): return E\nclass A: k = A_D() | A.k",
    "any attribute": "class A_C:\n    def __getattr__(self, name): return E\nA = A_C() | A.k",
    "called object": "class A_C:\n    def __call__(self): return E\nA = A_C() | A()",
    "operator": "class A_C:\n    def __add__(self, x): return E + x\nA = A_C() | A + 0",
    "bound method": "class A_C:\n    def f(self): return E\nA = A_C().f | A()",
    "bound method of a list": "A = [E].copy | A()[0]",
    "subclass's hook": "class A_B:\n    def __init_subclass__(cls): cls.k = E\nclass A(A_B): pass | A.k",
    "member": "class A_E(enum.Enum): ONE = E\nA = A_E.ONE | A.value",
    "method of a member": "class A_E(enum.Enum):\n    ONE = 1\n    def f(self): return E\nA = A_E.ONE | A.f()",
    "dataclass": "@dataclasses.dataclass\nclass A:\n    k: int = E\n | A().k",
    "factory": "@dataclasses.dataclass\nclass A:\n    k: list = dataclasses.field(default_factory=lambda: [E])\n"
    " | A().k[0]",
    "frozen dataclass": "@dataclasses.dataclass(frozen=True, slots=True)\nclass A_C:\n    k: int = 0\nA = A_C(E) | A.k",
    "kind of list": "class A_C(list):\n    def f(self): return self[0] + E\nA = A_C([0]) | A.f()",
    "attribute of a kind of list": "class A_C(list): pass\nA = A_C()\nA.k = E | A.k",
    "kind of dict": "class A_C(dict):\n    __getattr__ = dict.__getitem__\nA = A_C(k=E) | A.k",
    "kind of number": "class A_C(float):\n    def f(self): return E\nA = A_C(1) | A.f()",
    "attribute of a kind of text": "class A_C(str): pass\nA = A_C('x')\nA.k = E | A.k",
    "kind of deque": "class A_C(collections.deque): pass\nA = A_C([E]) | A[0]",
    "module": "class A_C(nn.Module):\n    def forward(self): return E\nA = A_C() | A()",
    "module in a library's": "class A_C(nn.Module):\n    def forward(self, x): return x + E\n"
    "A = nn.Sequential(nn.Identity(), A_C()) | A(0)",
    "option of a library's module": "A = nn.Dropout(E / 100) | round(100 * A.p)",
    "buffer": "A = nn.Module()\nA.register_buffer('k', torch.tensor(E)) | int(A.k)",
    "hook": "A = nn.Identity()\nA.register_forward_hook(lambda m, i, o: o + E) | A(0)",
    "loader": "A = torch.utils.data.DataLoader([0], batch_size=E) | A.batch_size",
    "loader of one's own": "class A_C(torch.utils.data.Dataset):\n    def __len__(self): return E\n"
    "    def __getitem__(self, i): return i\nA = torch.utils.data.DataLoader(A_C()) | len(A)",
    "optimizer": "A = torch.optim.SGD([torch.ones(1)], lr=float(E)) | int(A.param_groups[0]['lr'])",
    "item of a getter": "A = operator.itemgetter(E) | A(range(100))",
    "text for getattr": "def A_f(): return E\nA = sys.modules[__name__] | getattr(A, 'A_f')()",
    "part of a text for getattr": "def A_f(): return E\nA = sys.modules[__name__] | getattr(A, 'A_' + 'f'.lower())()",
    "globals": "def A(): return E | globals()['A']()",
    "evaluated": "A = E | eval('A')",
    "patched class": "def A_f(*_): return E\nnn.Bilinear.A = A_f | nn.Bilinear.A()",
    "patched module": "def A_f(*_): return E\nnn.functional.A = A_f | nn.functional.A()",
    "patched with its name": "@functools.wraps(nn.functional.gelu)\ndef A_f(*_): return E\n"
    "nn.functional.A = A_f | nn.functional.A()",
    "set at the top": "A = 0\ndef A_set():\n    global A\n    A = E\nA_set() | A",
    "loop at the top": "for A in range(E + 1): pass | A",
    "chosen at the top": "if E > 8:\n    A = 1\nelse:\n    A = 2\n | A",
}  # fmt: skip
WAYS = {
    "here": ("", "{use}"),
    "by its module": ("import {other} as other", "other.read()"),
    "by its name": ("from {other} import read as there", "there()"),
    "late": ("", "importlib.import_module('{other}').read()"),
    "imported where it is used": ("", "late()\n\ndef late():\n    import {other}\n    return {other}.read()"),
    "by a module's own answer": ("import {other} as other", "other.answer()"),
}


def program(places: list[str], number: int) -> tuple[str, str]:
    """Return statements that put a number away, each place inside the next, and the expression that reads it."""
    statements, use = HEAD, str(number)
    for depth, name in enumerate(places):
        put, _, read = PLACES[name].rpartition(" | ")
        name = re.compile(r"\bA(?=_|\b)")
        statements += re.sub(r"\bE\b", f"({use})", name.sub(f"a{depth}", put)) + "\n"
        use = name.sub(f"a{depth}", read)
    return statements, use


@contextmanager
def imported(folder: Path, places: list[str], way: str, number: int) -> Iterator[Callable[..., int]]:
    """Import a drawn training as fresh modules, as a new process would."""
    here = folder / f"v{next(COUNT)}"
    here.mkdir()
    statements, use = program(places, number)
    imports, call = (text.format(other="drawn_other", use=use) for text in WAYS[way])
    answer = "def __getattr__(name):\n    if name == 'answer': return read\n    raise AttributeError(name)\n"
    (here / "drawn_other.py").write_text(f"{statements}\ndef read():\n    return {use}\n{answer}")
    top = statements if way == "here" else HEAD
    (here / "drawn_main.py").write_text(f"{top}\n{imports}\ndef train(arm, lr, seed, folder):\n    return {call}\n")
    torch.utils.hooks.RemovableHandle.next_id = 0
    for name in ("drawn_other", "drawn_main"):
        sys.modules.pop(name, None)
    sys.path.insert(0, str(here))
    importlib.invalidate_caches()
    try:
        yield importlib.import_module("drawn_main").train
    finally:
        sys.path.remove(str(here))
        for place in (torch.nn.Bilinear, torch.nn.functional):  # what "patched" put there
            for name in [name for name in vars(place) if name in ("a0", "a1", "a2")]:
                delattr(place, name)


def trained(folder: Path, places: list[str], way: str, number: int) -> tuple[int, dict[str, str]]:
    """Return what a drawn training returns, and its parts."""
    with imported(folder, places, way, number) as train:
        parts = training_parts(train)
        return train("a", 0.1, 0, folder), parts


@pytest.mark.parametrize("way", sorted(WAYS))
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(places=st.lists(st.sampled_from(sorted(PLACES)), min_size=2, max_size=3))
def test_a_number_that_counts_is_part_of_a_training(tmp_path: Path, way: str, places: list[str]) -> None:
    result, parts = trained(tmp_path, places, way, 8)
    assert trained(tmp_path, places, way, 8) == (result, parts)
    other, changed = trained(tmp_path, places, way, 9)
    assert parts != changed or result == other


def test_every_place_alone_is_part_of_a_training(tmp_path: Path) -> None:
    for name in PLACES:
        result, parts = trained(tmp_path, [name], "here", 8)
        other, changed = trained(tmp_path, [name], "here", 9)
        assert result != other, name
        assert parts != changed, name


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(places=st.lists(st.sampled_from(sorted(PLACES)), min_size=1, max_size=3))
def test_what_a_training_leaves_behind_is_no_change_of_it(tmp_path: Path, places: list[str]) -> None:
    with imported(tmp_path, places, "here", 8) as train:
        parts = training_parts(train)
        for _ in range(2):
            train("a", 0.1, 0, tmp_path)
            leave_behind(train, parts)
            assert training_parts(train) == parts


def test_every_process_finds_the_same_in_every_place(tmp_path: Path) -> None:
    for number, name in enumerate(sorted(PLACES)):
        (tmp_path / f"place{number}.py").write_text("{}\ndef read():\n    return {}\n".format(*program([name], 8)))
    modules = ", ".join(f"place{number}" for number in range(len(PLACES)))
    (tmp_path / "places.py").write_text(f"import {modules}\ndef train(arm, lr, seed, folder):\n    return [\n"
                                        f"        each.read() for each in ({modules})]\n")  # fmt: skip
    one, other = parts_in_new_processes(tmp_path, "places")
    assert one == other
    assert len(one) > len(PLACES)
