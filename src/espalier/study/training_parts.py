"""Everything of a user's own that makes a training function what it is: its code, and the values that code can read.

Two trials of one study must come from one training. So its source is followed, and what is bound to it, on through the
functions, classes, objects and modules of the user's own that it names. What an installed library holds by a name is
known by that name, and an object that a library made by what it would be pickled as.
"""

from __future__ import annotations

import enum
import functools
import inspect
import io
import os
import sys
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import PurePath
from typing import Any

import numpy as np
import torch

from espalier.own_code import IMPORTERS, code_digest, digest
from espalier.study.code_names import all_code, is_own, names_in, own_module_files, patches, source_of, words_in

_PLAIN = (str, bytes, int, float, complex, bool, type(None), range, slice, PurePath, torch.dtype, torch.device)
_END = 1 << 27  # bytes
_DEEP = 60  # objects inside objects of libraries
# Functions of Python by which code may use anything of its own module, or of one that it names.
_ANY_NAME = {"globals", "eval", "exec"}
_ANY_ATTRIBUTE = {"getattr", "vars", "attrgetter", "methodcaller", "__dict__"}

# Note [What a training leaves behind]
# Counters, caches and options that the code itself changes are part of a training like all that it reads: in every
# trial options["lr"] may be set, and options["width"] be what is asked about. So values count as they are before the
# first trial. After trials in this process ``leave_behind`` notes, for this very function, what has become of the
# parts: to find exactly those again is to find the training as it was.
_left_behind: weakref.WeakKeyDictionary[Any, dict[str, dict[str, str]]] = weakref.WeakKeyDictionary()


def training_parts(function: Callable[..., Any]) -> dict[str, str]:
    """Return a digest of every part of a training, by its name: functions, constants, values bound to them."""
    parts = _parts_now(function)
    with suppress(TypeError):  # an object that can be no key
        return _left_behind.get(_innermost(function), {}).get(repr(parts), parts)
    return parts


def leave_behind(function: Any, parts: dict[str, str]) -> None:
    """Note that trials of a training, whose parts were these before, have ended in this process."""
    if (now := _parts_now(function)) != parts:
        with suppress(TypeError):
            _left_behind.setdefault(_innermost(function), {})[repr(now)] = parts


def _innermost(function: Any) -> Any:
    while isinstance(function, functools.partial | types.MethodType):
        function = function.func if isinstance(function, functools.partial) else function.__func__
    return function


def _parts_now(function: Callable[..., Any]) -> dict[str, str]:
    follower = _Follower()
    follower.begin(function)
    return {label: digest("\n".join(sorted(texts)).encode()) for label, texts in sorted(follower.found.items())}


class _Follower:
    """Follows values and code, and notes in ``found`` what there is by name."""

    def __init__(self) -> None:
        self.found: dict[str, set[str]] = {}
        self._seen: dict[int, tuple[Any, str]] = {}  # with what was seen, lest another object gets its id
        self._ahead: list[tuple[Callable[[Any], None], Any]] = []  # code calls code in chains of any length
        self._held: dict[Any, set[int]] = {}  # what modules have a name for
        self._outlets: set[int] = set()  # objects of libraries that hold an open file, or a thread
        self._opens = False  # whether one was met inside the value at hand
        self._depth = 0

    def begin(self, function: Callable[..., Any]) -> None:
        """Follow a training function, and name each value that is bound to it."""
        if isinstance(function, functools.partial):
            bound = {f"argument {place}": value for place, value in enumerate(function.args)} | function.keywords
            for name, value in bound.items():
                self._note(name, self.text(value))
            function = function.func
        self._note("the function", self.text(function))
        for name, value in patches():
            self._note(name, self.text(value))
        options = torch.get_default_dtype(), torch.get_float32_matmul_precision(), torch.get_default_device()
        self._note("torch's settings", f"{options} {torch.are_deterministic_algorithms_enabled()}")
        while self._ahead:
            follow, value = self._ahead.pop()
            follow(value)

    def text(self, value: Any) -> str:
        """Return what tells a value from others, the same in every process; the user's own is followed."""
        if isinstance(value, _PLAIN) and not is_own(type(value)):
            return f"{type(value).__name__} {_short(repr(value))}"
        if id(value) in self._seen:
            self._opens |= id(value) in self._outlets
            return self._seen[id(value)][1]
        if self._depth > _DEEP:
            self._ahead.append((lambda each: self._note("values far inside", self.text(each)), value))
            return f"{type(value).__qualname__} far inside"
        self._seen[id(value)] = value, f"{type(value).__qualname__} {_ask(value, '__qualname__')}"
        self._depth += 1
        text = self._text(value)
        self._depth -= 1
        self._seen[id(value)] = value, text
        self._opens |= id(value) in self._outlets
        return text

    def _text(self, value: Any) -> str:
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, type):
            return self._class(value)
        if not is_own(type(value)):
            return f"{type(value).__qualname__} {self._contents(value) or self._made_by_a_library(value)}"
        if isinstance(value, enum.Enum):
            return f"{self.text(type(value))} {value.name} {self.text(value.value)}"
        before = self._opens
        held = self._contents(value), self._made_on_a_library(value), self._attributes(value)
        self._opens = before  # what it holds open is told apart from the rest of it
        return f"{self.text(type(value))} {' '.join(held)}"

    def _contents(self, value: Any) -> str:
        """Return the text of what a value holds, if it is of a kind that is built in, or of the user's own on it."""
        own = is_own(type(value))

        def each_is(*kinds: type) -> bool:
            return type(value) in kinds or (own and isinstance(value, kinds))

        # Read as the plain kind would be: one of the user's own may answer for itself.
        if each_is(list, tuple):
            texts = map(self.text, (list if isinstance(value, list) else tuple).__iter__(value))
            return f"[{', '.join(texts)}]"
        if each_is(set, frozenset):
            return f"[{', '.join(sorted(map(self.text, frozenset(value))))}]"
        if each_is(dict):
            return f"[{', '.join(sorted(f'{self.text(k)}: {self.text(v)}' for k, v in dict.items(value)))}]"
        for plain in (str, bytes, int, float, complex):
            if isinstance(value, plain):
                return _short(plain.__repr__(value))
        if isinstance(value, torch.Tensor | np.ndarray):
            try:
                objects = isinstance(value, np.ndarray) and value.dtype.hasobject
                return self.text(value.tolist()) if objects else _numbers(value)
            except (RuntimeError, TypeError, NotImplementedError):  # it has no shape or no numbers yet
                return "empty"
        return ""

    def _made_by_a_library(self, value: Any) -> str:
        wrapped = inspect.getattr_static(value, "__wrapped__", None)  # what a decorator, such as `cache`, has kept
        name = f"{type(value).__module__} {_name(value)} {'' if wrapped is None else self.text(wrapped)}"
        if value is os.environ or isinstance(value, types.ModuleType) or self._is_held(value):
            return name
        if isinstance(value, functools.partial):
            return f"{name} {self.text([value.func, value.args, value.keywords])}"
        if isinstance(value, types.MappingProxyType):
            return f"{name} {self.text(dict(value))}"
        if isinstance(value, io.IOBase | threading.Thread):
            self._outlets.add(id(value))
            return name
        try:
            with warnings.catch_warnings(action="ignore"):
                parts = _pickled(value.__reduce_ex__(2))
        except Exception:  # what cannot be pickled may raise anything
            parts = value.state_dict() if isinstance(value, torch.nn.Module) else None
        before, self._opens = self._opens, False
        text = f"{name} {self.text(parts)}"
        if self._opens:  # a progress bar, a writer of logs: where it writes to is new in every process
            self._outlets.add(id(value))
            text = name
        self._opens = before
        return text

    def _made_on_a_library(self, value: Any) -> str:
        """Return what a value of the user's own holds by the kinds of libraries that it is made on."""
        kind = next(each for each in type(value).__mro__ if not is_own(each) and "__reduce__" in vars(each))
        try:
            parts = None if kind is object else _pickled(_ask(kind, "__reduce__")(value))
        except Exception:
            parts = None
        return self.text(parts)

    def _is_held(self, value: Any) -> bool:
        """Return whether a library has a name for it: its functions, and what there is one of, as torch's generator."""
        bound, name = _ask(value, "__self__"), str(_ask(value, "__name__"))
        for module in {_ask(value, "__module__"), type(value).__module__, type(bound).__module__}:
            there = sys.modules.get(module) if isinstance(module, str) else None
            held = {} if there is None or is_own(there) else vars(there)
            if module not in self._held:
                self._held[module] = {id(each) for each in held.values()}
            if id(value) in self._held[module] or (bound is not None and held.get(name) == value):
                return True
        return False

    def _attributes(self, value: Any) -> str:
        held = dict(_ask(value, "__dict__") or {})
        for kind in type(value).__mro__:
            slots = getattr(kind, "__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                private = name.startswith("__") and not name.endswith("__")
                full = f"_{kind.__name__.lstrip('_')}{name}" if private else name
                held[full] = _ask(value, full)
        return self.text(held)

    def _class(self, kind: type) -> str:
        if not is_own(kind):
            return f"class {kind.__module__}.{kind.__qualname__}"
        self._ahead.append((self._follow_class, kind))
        return f"class {kind.__qualname__}"

    def _follow_class(self, kind: type) -> None:
        name = f"class {kind.__qualname__}"
        for above in (type(kind), *kind.__bases__):
            self._note(name, self.text(above))
        members = isinstance(kind, enum.EnumMeta)  # each is known where it is used
        for attribute, value in vars(kind).items():
            if inspect.isroutine(value) or (not attribute.startswith("__") and not members) or callable(value):
                for inner in _inside(value):
                    self._note(name, f"{attribute}: {self.text(inner)}")

    def _function(self, function: types.FunctionType) -> str:
        wrapped = function.__dict__.get("__wrapped__")
        text = f"{_name(function)} {'' if wrapped is None else self.text(wrapped)}"
        if is_own(function):
            self._ahead.append((self._follow_function, function))
            return f"function {text}"
        # A library's, around the user's own.
        return f"function {text} {self.text([_filled(cell) for cell in function.__closure__ or ()])}"

    def _follow_function(self, function: types.FunctionType) -> None:
        name, code, known = function.__qualname__, function.__code__, function.__globals__
        used = list(names_in(code))
        self._note(name, source_of(code))
        self._note(name, self.text([function.__defaults__, function.__kwdefaults__, function.__dict__]))
        names, constants = {given for _, given in used}, set(words_in(code))
        wanted = {given for how, given in used if how in ("LOAD_GLOBAL", "LOAD_NAME")}  # no attribute: model.eval()
        any_name = bool(wanted & _ANY_NAME) or {"sys", "modules"} <= names
        any_attribute = any_name or bool(names & _ANY_ATTRIBUTE)
        wanted |= constants if any_name else set()
        values = {given: known[given] for given in wanted if given in known}
        values |= all_code(known) if any_name else {}
        cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
        values |= {given: _filled(cell) for given, cell in cells}
        for given, value in values.items():
            if not given.startswith("__"):
                self._note(given, self.text(value))
        modules = [value for value in values.values() if isinstance(value, types.ModuleType)]
        # A module's own __getattr__ answers for any name.
        self._modules(modules, names | constants | {"__getattr__"}, any_attribute)
        package = known.get("__package__")
        for given in sorted({given for how, given in used if how == "IMPORT_NAME"}):
            self._imports(given, package)
        for given in sorted(constants) if names & IMPORTERS else ():
            self._imports(given.strip("."), package, inside=True)

    def _modules(self, modules: list[types.ModuleType], names: set[str], any_attribute: bool) -> None:
        """Follow what code may take from the user's own modules, by their dots or by words."""
        for module in modules:  # it grows
            if not is_own(module):
                continue
            found = {given: vars(module)[given] for given in names if given in vars(module)}
            for given, value in sorted((found | (all_code(vars(module)) if any_attribute else {})).items()):
                self._note(f"{module.__name__}.{given}", self.text(value))
                if isinstance(value, types.ModuleType) and value not in modules:
                    modules.append(value)

    def _imports(self, name: str, package: str | None, inside: bool = False) -> None:
        """Take the whole text of a module of the user's own that is imported where the code runs."""
        for full in (name, f"{package}.{name}"):
            if files := own_module_files(full, inside):
                self._note(full, " ".join(sorted(map(code_digest, files))))

    def _note(self, name: str, text: str) -> None:
        self.found.setdefault(name, set()).add(text)


def _pickled(made: Any) -> Any:
    """Return what pickle would keep of an object, as values: its maker, arguments, state and items."""
    return made if isinstance(made, str) else [*made[:3], *map(list, filter(None, made[3:5]))]


def _name(value: Any) -> str:
    return f"{_ask(value, '__module__')}.{_ask(value, '__qualname__') or _ask(value, '__name__')}"


def _ask(value: Any, name: str) -> Any:
    """Return an attribute, None if there is none: a value that answers for itself may raise anything."""
    try:
        return getattr(value, name, None)
    except Exception:
        return None


def _inside(value: Any) -> Iterator[Any]:
    """Yield what of a class's attribute can be followed: the functions behind a descriptor, else the value."""
    if isinstance(value, staticmethod | classmethod):
        yield value.__func__
    elif isinstance(value, property):
        yield from (each for each in (value.fget, value.fset, value.fdel) if each is not None)
    elif isinstance(value, functools.cached_property):
        yield value.func
    elif not isinstance(value, types.MemberDescriptorType | types.GetSetDescriptorType):
        yield value


def _filled(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is filled later
        return None


def _numbers(value: Any) -> str:
    """Return dtype and shape of an array and a digest of its numbers where they are at hand; of many, of both ends."""
    text = f"{value.dtype} {tuple(value.shape)}"
    if isinstance(value, torch.Tensor):
        text += " with a gradient" if value.requires_grad else ""
        if value.device.type != "cpu" or value.layout != torch.strided or value.is_quantized:
            return text
        flat = value.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
        # Of a copy: NumPy's view would keep torch from resizing the tensor ever after.
        value = (torch.cat((flat[:_END], flat[-_END:])) if flat.nbytes > 2 * _END else flat.clone()).numpy()
    if value.nbytes > 2 * _END:
        value = value.reshape(-1)  # a view, of a file as it lies there
        count = _END // value.itemsize
        return f"{text} {digest(value[:count].tobytes())} {digest(value[-count:].tobytes())}"
    return f"{text} {digest(value.tobytes())}"


def _short(text: str) -> str:
    return text if len(text) < 1000 else f"{len(text)} {digest(text.encode(errors='surrogatepass'))}"
