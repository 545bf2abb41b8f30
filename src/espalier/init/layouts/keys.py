"""All that decides what a module computes but the values of its parameters, as a key under which verdicts are kept.

A verdict on one module is taken for another only where nothing at all tells them apart: classes and the code of their
methods, every attribute as deep as it goes, buffers by their contents, functions with what they close over and name.
What holds something that is not understood gets a key of its own, so that it is judged by itself.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import sys
import sysconfig
from argparse import Namespace
from collections.abc import Hashable, Mapping
from contextlib import suppress
from dataclasses import is_dataclass
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from espalier.contents import bytes_in
from espalier.init.layouts.scratch import signs_of

_PYTHON = sysconfig.get_paths()["stdlib"]
_MODULE_FIELDS = frozenset(vars(nn.Module())) - {"training"}
_VALUES = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout, torch.memory_format)
_NAMED = (type, ModuleType, BuiltinFunctionType, enum.Enum, CodeType, torch.jit.ScriptFunction)
_COLLECTIONS = (dict, list, tuple, set, frozenset, SimpleNamespace)
# Attributes that number a layer, and seldom change what it computes: where they do not, one proof is that of all.
NUMBERS = frozenset({"layer_idx", "layer_id", "layer_index", "layer_number", "layer_num", "block_idx", "idx"})
# Contents of tensors up to this many numbers are compared.
_LARGEST = 2**24


class _UnknownError(Exception):
    """Something is met whose contents cannot be told."""


class _Same:
    """Equal to what holds the very same object, which lives as long as the key."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.held is other.held

    def __hash__(self) -> int:
        return id(self.held)


def module_key(module: nn.Module, but: frozenset[str] = frozenset(), *, signs: bool = False) -> Hashable:
    """Return a key that two modules share if they compute the same with the same parameters, or one of its own.

    Args:
        module: the module.
        but: names of attributes that are left out.
        signs: tell apart what a copy keeps of parameters (``signs_of``), too.
    """
    try:
        return _Reader(but, signs).read(module)
    except Exception:  # what is met may be anything, and raise anything
        return object()


class _Reader:
    """Reads one module; what is met again is named by its place in the order of meeting."""

    def __init__(self, but: frozenset[str], signs: bool) -> None:
        self.left_out, self.signs = _MODULE_FIELDS | but, signs
        # The objects themselves are kept, so that no number is given twice.
        self.met: dict[int, tuple[int, Any]] = {}
        self.classes: dict[type, Hashable] = {}

    def read(self, value: Any) -> Hashable:
        if value is None or isinstance(value, _VALUES):
            return type(value), value
        if type(value) is object or (isinstance(value, _NAMED) and not _is_users(value)):
            return _Same(value)
        if id(value) in self.met:
            return "met", self.met[id(value)][0]
        self.met[id(value)] = len(self.met), value
        return type(value).__name__, self._contents(value)

    def _contents(self, value: Any) -> Hashable:
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, MethodType):
            return self.read(value.__func__), self.read(value.__self__)
        if isinstance(value, functools.partial):
            return self.read(value.func), self._items(value.args), self._pairs(value.keywords)
        if isinstance(value, list | tuple):
            return self._items(value)
        if isinstance(value, Mapping):
            return self._pairs(value), self._pairs(getattr(value, "__dict__", {}))
        if isinstance(value, set | frozenset):
            return frozenset(map(self.read, value))
        if hasattr(value, "__dict__") and not hasattr(type(value), "__slots__"):
            return self._class(type(value)), self._pairs(vars(value))
        raise _UnknownError(type(value).__name__)

    def _items(self, values: Any) -> Hashable:
        return tuple(map(self.read, values))

    def _pairs(self, values: Mapping[Any, Any]) -> Hashable:
        return tuple((self.read(key), self.read(value)) for key, value in values.items())

    def _module(self, module: nn.Module) -> Hashable:
        own = {key: value for key, value in vars(module).items() if key not in self.left_out}
        shapes = tuple((key, self._parameter(p)) for key, p in module._parameters.items() if p is not None)
        parts: list[Mapping[str, Any]] = [module._buffers, module._modules, own]
        kept = [signs_of(module, key, p) for key, p in module._parameters.items() if p is not None and self.signs]
        turned = tuple(None if signs is None else tuple(signs.flatten().tolist()) for signs in kept)
        return (self._class(type(module)), shapes, turned, *map(self._pairs, parts))

    def _parameter(self, parameter: Tensor) -> Hashable:
        """Return its shape, and whether it is one that was met: its values are not asked."""
        first = self.met.setdefault(id(parameter), (len(self.met), parameter))[0]
        return first, None if is_lazy(parameter) else tuple(parameter.shape)

    def _tensor(self, tensor: Tensor) -> Hashable:
        plain = type(tensor) in (Tensor, nn.Parameter, nn.Buffer) and tensor.layout == torch.strided
        if not plain or is_lazy(tensor) or tensor.numel() > _LARGEST:
            raise _UnknownError("a tensor")
        digest = ""
        if not tensor.is_meta and tensor.numel():
            found = hashlib.blake2b(digest_size=16)
            for piece in bytes_in(tensor):
                found.update(piece)
            digest = found.hexdigest()
        return tuple(tensor.shape), tensor.dtype, tensor.is_meta, digest

    def _function(self, function: FunctionType) -> Hashable:
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
        bound = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).items(), *cells)
        return self._code(function), self._items(bound)

    def _code(self, function: FunctionType) -> Hashable:
        """Return a function's code, and what its names stand for in its module now: in code of the user's, deeper."""
        known, code, told = function.__globals__, function.__code__, list[Hashable]()
        if _is_installed(function):
            named = [(name, known[name]) for name in code.co_names if name in known]
            told += [
                (name, (type(value), value) if isinstance(value, _VALUES) else _Same(value)) for name, value in named
            ]
        else:
            names = sorted(names_in(code))
            told = [(name, self._named(known[name])) for name in names if name in known]
            within = [vars(known[name]) for name in names if isinstance(known.get(name), ModuleType)]
            told += [(name, self._named(held[name])) for held in within for name in names if name in held]
        return _Same(code), _Same(known), tuple(told)

    def _named(self, value: Any) -> Hashable:
        """Return what a name of a module stands for, with what it holds now: a setting, a class of them, a function.

        What a library defines stays as it is, but for what holds settings; so does a network, which has a key itself.
        """
        followed = isinstance(value, FunctionType) and not _is_installed(value)
        settings = isinstance(value, (*_VALUES, Mapping, *_COLLECTIONS)) or is_dataclass(type(value))
        cls = value if isinstance(value, type) else type(value)
        if followed or settings or (_is_users(cls) and not isinstance(value, nn.Module | Tensor)):
            with suppress(Exception):  # of anybody's classes, or too deep
                return self.read(value)
        return _Same(value)

    def _class(self, cls: type) -> Hashable:
        """Return a class with what it and its parents outside of torch define: another function is another key."""
        if cls in self.classes:  # models repeat theirs, and reading one takes longer than the rest of a module
            return self.classes[cls]
        self.classes[cls] = "class", len(self.classes)  # what its own code says of it
        parts: list[Hashable] = [_Same(cls)]
        for parent in cls.__mro__:
            if parent is object or parent.__module__.partition(".")[0] in ("torch", "builtins"):
                continue
            for name, value in vars(parent).items():
                function = getattr(value, "__func__", getattr(value, "fget", value))
                library = isinstance(function, FunctionType) and _is_installed(function)
                parts.append((name, _Same(value), self._code(function) if library else self._named(function)))
        self.classes[cls] = tuple(parts)
        return self.classes[cls]


def names_in(code: CodeType) -> set[str]:
    """Return the names that a function's code looks up, also those in functions and comprehensions within it."""
    inner = (names_in(each) for each in code.co_consts if isinstance(each, CodeType))
    return set(code.co_names).union(*inner)


def _is_installed(function: FunctionType) -> bool:
    """Return whether a function is an installed library's, which stays as it is while a program runs."""
    return _is_library(function.__code__.co_filename)


def _is_library(file: str) -> bool:
    return "site-packages" in file or "dist-packages" in file or file.startswith((_PYTHON, "<frozen"))


def _is_users(cls: Any) -> bool:
    """Return whether something is a class whose contents a program may change: its own, or one that holds settings."""
    if not isinstance(cls, type) or cls.__module__ in ("builtins", "torch", "numpy"):
        return False
    return cls is Namespace or not _is_library(getattr(sys.modules.get(cls.__module__), "__file__", None) or _PYTHON)
