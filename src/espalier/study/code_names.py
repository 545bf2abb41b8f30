"""Code as a training's parts see it: whose it is, what it says, and which names it asks for."""

from __future__ import annotations

import dis
import functools
import importlib.util
import inspect
import sys
import textwrap
import tokenize
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from espalier.own_code import files_of, is_dotted, is_own_file

_MAIN = ("__main__", "__mp_main__")  # a script, a notebook, a prompt


def is_own(value: Any) -> bool:
    """Return whether a function, class or module is the user's, and not of an installed library."""
    if isinstance(value, types.FunctionType):
        if is_own_file(value.__code__.co_filename):
            return True
        name = value.__globals__.get("__name__")
    else:
        name = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
    if name in _MAIN:
        return True
    file = getattr(sys.modules.get(name or ""), "__file__", None)
    return file is not None and is_own_file(file)


def patches() -> Iterator[tuple[str, Any]]:
    """Yield the functions of the user's own that were put into modules and classes of libraries, by their places."""
    loaded = {name: each for name, each in list(sys.modules.items()) if isinstance(each, types.ModuleType)}
    own = {name for name, module in loaded.items() if is_own(module)} | set(_MAIN)

    def in_place(holder: Any, place: str) -> Iterator[tuple[str, Any]]:
        for attribute, value in list(vars(holder).items()):
            if type(value) is types.FunctionType and value.__globals__.get("__name__") in own:
                yield f"{place}.{attribute}", value

    for name in sorted(loaded.keys() - own):
        yield from in_place(loaded[name], name)
        for attribute, value in list(vars(loaded[name]).items()):
            if issubclass(type(value), type) and vars(value).get("__module__") == name:
                yield from in_place(value, f"{name}.{attribute}")


def all_code(names: Mapping[str, Any]) -> dict[str, Any]:
    """Return the functions and classes of the user's own among the names of a module."""
    return {
        name: value for name, value in names.items() if isinstance(value, types.FunctionType | type) and is_own(value)
    }


def own_module_files(name: str, inside: bool = False) -> list[Path]:
    """Return the files of the user's own that importing a module runs first; nothing is imported to find out."""
    top = name.partition(".")[0]
    loaded = sys.modules.get(top)
    try:
        spec = importlib.util.find_spec(top) if loaded is None else loaded.__spec__
    except (ImportError, ValueError):
        return []
    if spec is None:
        return []
    places = spec.submodule_search_locations or ([spec.origin] if spec.has_location and spec.origin else [])
    folders = [Path(each).parent for each in places]
    return [file for folder in folders for file in files_of(folder, name, inside) if is_own_file(file)]


@functools.lru_cache(maxsize=1 << 12)
def source_of(code: types.CodeType) -> str:
    """Return the source of code; where there is none, what it does: its instructions, names and constants."""
    try:
        return textwrap.dedent(inspect.getsource(code))
    except (OSError, TypeError, SyntaxError, tokenize.TokenError):  # typed at a prompt, compiled, or being edited
        inner = []
        for each in code.co_consts:
            if isinstance(each, types.CodeType):
                inner.append(source_of(each))
            else:  # a set has no order that lasts
                inner.append(repr(sorted(map(repr, each)) if isinstance(each, frozenset) else each))
        return f"{code.co_name} {code.co_code.hex()} {code.co_names} {inner}"


def names_in(code: types.CodeType) -> Iterator[tuple[str, Any]]:
    """Yield (instruction, name) of every name in code and in functions inside it."""
    for step in dis.get_instructions(code):
        if step.opcode in dis.hasname:
            yield step.opname, step.argval
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from names_in(inner)


def words_in(code: types.CodeType) -> Iterator[str]:
    """Yield the texts among the constants of code and of functions inside it that may be names."""
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from words_in(constant)
        for word in constant if isinstance(constant, tuple) else (constant,):
            if isinstance(word, str) and is_dotted(word):
                yield word
