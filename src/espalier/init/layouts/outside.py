"""What runs of a user's code leave outside of the modules that are run: lists, counters, caches, generators; put back.

Copies of modules are run in float64 and many times (``scratch``). What their code keeps in globals, in classes, in
objects that a copy shares or behind ``functools.cache`` would stay: a table of positions in float64, say, that the
model then meets. Not seen: files, other processes, and what is kept deeper than a container in one of these places.
"""

from __future__ import annotations

import functools
import os
import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from types import FunctionType, ModuleType
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

_LIBRARIES = {"torch", "espalier", "numpy", *sys.stdlib_module_names} - {"__main__"}
_DATA = (bool, int, float, complex, str, bytes, list, dict, set, tuple, deque, Tensor, type(None))
# Classes of a user's own may make something else of what they hold.
_CONTAINERS = (list, deque, dict, set, OrderedDict, defaultdict, Counter)
# What is larger is no note of a run, and is not copied.
_LARGEST = 100_000

_Cache = functools._lru_cache_wrapper
Undo = Callable[[], object]
P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def outside_kept(model: nn.Module) -> Iterator[None]:
    """Put back, on leaving, what stood outside of a model's modules in their code's modules, classes and objects."""
    undo = [step for place in _places(model) for step in _kept_table(*place)]
    exact, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    undo.append(partial(_put_back_settings, dict(os.environ), torch.get_num_threads(), exact, warns))
    try:
        yield
    finally:
        for step in undo:
            step()


def leaves_outside_alone(function: Callable[Concatenate[nn.Module, P], R]) -> Callable[Concatenate[nn.Module, P], R]:
    """Run a function of a model within ``outside_kept`` (decorator)."""

    @functools.wraps(function)
    def kept(model: nn.Module, *args: P.args, **kwargs: P.kwargs) -> R:
        with outside_kept(model) if isinstance(model, nn.Module) else nullcontext():
            return function(model, *args, **kwargs)

    return kept


def _put_back_settings(environment: Mapping[str, str], threads: int, exact: bool, warns: bool) -> None:
    """Put back what a process and torch were set to, where it was changed."""
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update({name: value for name, value in environment.items() if os.environ.get(name) != value})
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    if torch.are_deterministic_algorithms_enabled() != exact:
        torch.use_deterministic_algorithms(exact, warn_only=warns)


def _places(model: nn.Module) -> Iterator[tuple[Any, MutableMapping[str, Any]]]:
    """Yield classes, modules of code and objects with their tables of names."""
    met = set[int]()
    for part in model.modules():
        classes = [cls for cls in type(part).__mro__ if _home(cls) not in _LIBRARIES]
        code = [sys.modules[cls.__module__] for cls in classes if cls.__module__ in sys.modules]
        named = [thing for module in code for thing in vars(module).values() if _is_function(thing)]
        code += [sys.modules[f.__module__] for f in named if _home(f) not in _LIBRARIES and f.__module__ in sys.modules]
        shared = [item for item in vars(part).values() if _is_users(item)]
        for place in (*classes, *code, *shared):
            if id(place) not in met:
                met.add(id(place))
                yield place, vars(place)


def _is_users(item: Any) -> bool:
    known = isinstance(item, nn.Module | Tensor | type | FunctionType | ModuleType)
    return not known and hasattr(item, "__dict__") and _home(type(item)) not in _LIBRARIES


def _is_function(thing: Any) -> bool:
    return isinstance(thing, FunctionType | _Cache)


def _home(thing: Any) -> str:
    return str(getattr(thing, "__module__", "")).partition(".")[0]


def _kept_table(place: Any, table: MutableMapping[str, Any]) -> Iterator[Undo]:
    """Yield what puts back the names of a place and what they hold."""
    names = {name: value for name, value in table.items() if not name.startswith("__")}

    def put_back() -> None:
        for name, value in names.items():
            if table.get(name) is not value:
                setattr(place, name, value)
        for name in [name for name in table if name not in names and not name.startswith("__")]:
            if isinstance(table[name], _DATA):  # what was imported meanwhile stays
                delattr(place, name)

    yield put_back
    for value in names.values():
        with suppress(Exception):  # anybody's classes, which may refuse to be looked at
            if (undo := _kept(value)) is not None:
                yield undo


def _kept(value: Any) -> Undo | None:
    """Return what puts back the contents of something that keeps some, or None."""
    if type(value) in _CONTAINERS:
        return None if value is sys.modules or len(value) > _LARGEST else _kept_container(value)
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    if isinstance(value, np.random.RandomState):
        return partial(value.set_state, value.get_state())
    if isinstance(value, random.Random) and type(value) is not random.SystemRandom:
        return partial(value.setstate, value.getstate())
    if isinstance(value, np.random.Generator):
        return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    if isinstance(value, _Cache):
        before = value.cache_info()

        def forget() -> None:
            if (now := value.cache_info()).misses != before.misses or now.currsize != before.currsize:
                value.cache_clear()

        return forget
    return None


def _kept_container(value: Any) -> Undo:
    before = value.copy()
    things = [id(part) for part in (before.values() if isinstance(before, dict) else before)]

    def put_back() -> None:
        if [id(part) for part in (value.values() if isinstance(value, dict) else value)] != things:
            value.clear()
            (value.update if isinstance(value, dict | set) else value.extend)(before)

    return put_back
