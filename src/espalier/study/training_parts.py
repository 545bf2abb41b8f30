"""Everything of a user's own that makes a training function what it is: its code, and the values that code can read.

Two trials of one study must come from one training. So its source is followed, and what is bound to it, on through the
functions, classes, objects and modules of the user's own that it names; what an installed library holds is known by its
name. A value that the code itself changes is a counter or a cache, and no part of it.
"""

from __future__ import annotations

import ast
import dis
import enum
import functools
import importlib.util
import inspect
import os
import sys
import textwrap
import tokenize
import types
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch

from espalier.own_code import code_digest, digest, is_own_file

_PLAIN = (str, bytes, int, float, complex, bool, type(None), range, slice, PurePath, torch.dtype, torch.device)
_CHANGERS = {"add", "append", "appendleft", "clear", "discard", "extend", "extendleft", "insert", "pop", "popitem"}
_CHANGERS |= {"popleft", "remove", "reverse", "setdefault", "sort", "update"}
_END = 1 << 27  # bytes
_MAKERS = ("__init__", "__new__", "__post_init__", "__setstate__")  # what they assign is not changed later


def training_parts(function: Callable[..., Any]) -> dict[str, str]:
    """Return a digest of every part of a training, by its name: functions, constants, values bound to them."""
    # Which values the code changes is known when all of it was seen: then it is followed anew.
    first = _Follower(set())
    first.begin(function)
    second = _Follower(first.changed)
    second.begin(function)
    return {label: digest("\n".join(sorted(texts)).encode()) for label, texts in sorted(second.found.items())}


class _Follower:
    """Follows values and code, and notes in ``found`` what there is by name."""

    def __init__(self, changed: set[str]) -> None:
        self.found: dict[str, set[str]] = {}
        self.changed = set(changed)
        self._seen: dict[int, tuple[Any, str]] = {}  # with what was seen, lest another object gets its id
        self._ahead: list[tuple[Callable[[Any], None], Any]] = []  # code calls code in chains of any length

    def begin(self, function: Callable[..., Any]) -> None:
        """Follow a training function, and name each value that is bound to it."""
        if isinstance(function, functools.partial):
            bound = {f"argument {place}": value for place, value in enumerate(function.args)} | function.keywords
            for name, value in bound.items():
                self._note(name, self.text(value))
            function = function.func
        self._note("the function", self.text(function))
        while self._ahead:
            follow, value = self._ahead.pop()
            follow(value)

    def text(self, value: Any) -> str:
        """Return what tells a value from others, the same in every process; the user's own is followed."""
        if isinstance(value, enum.Enum):
            return f"{type(value).__qualname__}.{value.name} {self.text(value.value)}"
        if isinstance(value, _PLAIN):
            return f"{type(value).__name__} {value!r}"
        if id(value) in self._seen:
            return self._seen[id(value)][1]
        self._seen[id(value)] = value, f"{type(value).__qualname__} {getattr(value, '__qualname__', '')}"
        text = self._text(value)
        self._seen[id(value)] = value, text
        return text

    def _text(self, value: Any) -> str:
        own = is_own(type(value))
        kind = self.text(type(value)) if own else type(value).__qualname__
        if isinstance(value, list | tuple):
            return f"{kind} [{', '.join(map(self.text, value))}]"
        if isinstance(value, set | frozenset):
            return f"{kind} [{', '.join(sorted(map(self.text, value)))}]"
        if isinstance(value, Mapping) and value is not os.environ:
            return f"{kind} [{', '.join(sorted(f'{self.text(k)}: {self.text(v)}' for k, v in value.items()))}]"
        if isinstance(value, torch.Tensor | np.ndarray):
            try:
                return f"{kind} {_numbers(value)}"
            except (RuntimeError, TypeError, NotImplementedError):  # it has no shape or no numbers yet
                return kind
        if isinstance(value, functools.partial):
            return f"{kind} of {self.text(value.func)} {self.text(value.args)} {self.text(value.keywords)}"
        if isinstance(value, types.MethodType):
            return f"{kind} {self.text(value.__func__)} of {self.text(value.__self__)}"
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, type):
            return self._class(value)
        if own or isinstance(value, types.SimpleNamespace | Namespace):
            return f"{kind} {self._attributes(value)}"
        if isinstance(value, torch.nn.Module):
            return f"{value!r} {self.text(dict(value.state_dict()))}"
        return f"{type(value).__module__}.{kind} {_name(value)}{self._wrapped(value)}"

    def _attributes(self, value: Any) -> str:
        held = dict(getattr(value, "__dict__", {}))
        for kind in type(value).__mro__:
            slots = getattr(kind, "__slots__", ())
            held |= {name: getattr(value, name, None) for name in ((slots,) if isinstance(slots, str) else slots)}
        return self.text({name: what for name, what in held.items() if name not in self.changed})

    def _class(self, kind: type) -> str:
        if not is_own(kind):
            return f"class {kind.__module__}.{kind.__qualname__}"
        self._ahead.append((self._follow_class, kind))
        return f"class {kind.__qualname__}"

    def _follow_class(self, kind: type) -> None:
        name = f"class {kind.__qualname__}"
        for base in kind.__bases__:
            self._note(name, self.text(base))
        for attribute, value in vars(kind).items():
            if attribute not in self.changed and (callable(value) or not attribute.startswith("__")):
                for inner in _inside(value):
                    self._note(name, f"{attribute}: {self.text(inner)}")

    def _function(self, function: types.FunctionType) -> str:
        if is_own(function):
            self._ahead.append((self._follow_function, function))
            return f"function {function.__qualname__}{self._wrapped(function)}"
        held = [_contents(cell) for cell in function.__closure__ or ()]  # a library's, around one of the user's
        return f"function {_name(function)} {[self.text(each) for each in held if callable(each)]}"

    def _wrapped(self, value: Any) -> str:
        """Return the text of what a decorator, such as ``functools.cache``, has kept of a function."""
        wrapped = inspect.getattr_static(value, "__wrapped__", None)
        return "" if wrapped is None else f" of {self.text(wrapped)}"

    def _follow_function(self, function: types.FunctionType) -> None:
        name, code, known = function.__qualname__, function.__code__, function.__globals__
        source, used = _source(code), list(_names(code))
        self._note(name, source)
        self._note(name, self.text([function.__defaults__, function.__kwdefaults__]))
        cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
        values = {given: known[given] for how, given in used if how in ("LOAD_GLOBAL", "LOAD_NAME") and given in known}
        values |= {given: _contents(cell) for given, cell in cells}
        names, attributes = _changed(source)
        self.changed |= {given for how, given in used if how in ("STORE_GLOBAL", "DELETE_GLOBAL")}
        self.changed |= (names & values.keys()) | (attributes if code.co_name not in _MAKERS else frozenset())
        for given, value in values.items():
            if given not in self.changed and not given.startswith("__"):
                self._note(given, self.text(value))
        self._modules([value for value in values.values() if isinstance(value, types.ModuleType)], used)
        self._imports([given for how, given in used if how == "IMPORT_NAME"], known.get("__package__"))

    def _modules(self, modules: list[types.ModuleType], used: list[tuple[str, Any]]) -> None:
        """Follow what code may take from the user's own modules by their dots."""
        names = sorted({given for _, given in used if given})
        for module in modules:  # it grows
            for given in names if is_own(module) else ():
                if given in vars(module) and given not in self.changed:
                    value = vars(module)[given]
                    self._note(f"{module.__name__}.{given}", self.text(value))
                    if isinstance(value, types.ModuleType) and value not in modules:
                        modules.append(value)

    def _imports(self, names: list[str], package: str | None) -> None:
        """Take the whole text of the user's own modules that are imported where the code runs."""
        for name in names:
            for full in (name, f"{package}.{name}"):
                file = _own_module_file(full)
                if file is not None:
                    self._note(full, code_digest(file))

    def _note(self, name: str, text: str) -> None:
        self.found.setdefault(name, set()).add(text)


def is_own(value: Any) -> bool:
    """Return whether a function, class or module is the user's, and not of an installed library."""
    name = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
    if name in ("__main__", "__mp_main__"):  # a script, a notebook, a prompt
        return True
    file = getattr(sys.modules.get(name or ""), "__file__", None)
    return file is not None and is_own_file(file)


def _name(value: Any) -> str:
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', getattr(value, '__name__', ''))}"


def _own_module_file(name: str) -> Path | None:
    """Return where one of the user's own modules lies; nothing of a library is imported to find out."""
    top, loaded = name.partition(".")[0], sys.modules.get(name)
    try:
        if loaded is not None:
            file = getattr(loaded, "__file__", None)
        else:
            above = importlib.util.find_spec(top)
            if above is None or not (above.origin is None or is_own_file(above.origin)):
                return None
            spec = importlib.util.find_spec(name)
            file = spec and spec.origin
    except (ImportError, ValueError, AttributeError):
        return None
    return Path(file) if file and is_own_file(file) else None


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


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is filled later
        return None


def _numbers(value: Any) -> str:
    """Return dtype and shape of an array and a digest of its numbers where they are at hand; of many, of both ends."""
    text = f"{value.dtype} {tuple(value.shape)}"
    if isinstance(value, torch.Tensor):
        if value.device.type != "cpu" or value.layout != torch.strided or value.is_quantized:
            return text
        value = value.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy()
    if value.dtype.hasobject:
        return text
    if value.nbytes > 2 * _END:
        value = value.reshape(-1)  # a view, of a file as it lies there
        count = _END // value.itemsize
        return f"{text} {digest(value[:count].tobytes())} {digest(value[-count:].tobytes())}"
    return f"{text} {digest(value.tobytes())}"


@functools.lru_cache(maxsize=1 << 12)
def _source(code: types.CodeType) -> str:
    try:
        return textwrap.dedent(inspect.getsource(code))
    except (OSError, TypeError, SyntaxError, tokenize.TokenError):  # typed at a prompt, compiled, or being edited
        inner = []
        for each in code.co_consts:
            if isinstance(each, types.CodeType):
                inner.append(_source(each))
            else:  # a set has no order that lasts
                inner.append(repr(sorted(map(repr, each)) if isinstance(each, frozenset) else each))
        return f"{code.co_name} {code.co_code.hex()} {code.co_names} {inner}"


def _names(code: types.CodeType) -> Iterator[tuple[str, Any]]:
    """Yield (instruction, name) of every name in code and in functions inside it."""
    for step in dis.get_instructions(code):
        if step.opcode in dis.hasname:
            yield step.opname, step.argval
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _names(inner)


@functools.lru_cache(maxsize=1 << 8)
def _changed(source: str) -> tuple[frozenset[str], frozenset[str]]:
    """Return the names and the attributes whose values the source changes in place, or binds anew."""
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a lambda in the middle of an expression
        return frozenset(), frozenset()
    names, attributes = set(), set()
    for node in ast.walk(tree):
        target: Any = None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _CHANGERS:
            target = node.func.value
        elif isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
            target = node
        elif isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
            target = node.value
        elif isinstance(node, ast.Nonlocal):
            names |= set(node.names)
        while isinstance(target, ast.Subscript):
            target = target.value
        if isinstance(target, ast.Attribute):
            attributes.add(target.attr)
        elif isinstance(target, ast.Name):
            names.add(target.id)
    return frozenset(names), frozenset(attributes)
