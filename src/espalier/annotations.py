"""Plain values from a command line or a file, held to the annotations of the function that gets them."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import NoneType, SimpleNamespace, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from espalier.errors import EspalierError

_PLAIN = (bool, int, float, str, NoneType, tuple, list)
_LISTS = (tuple, list, Sequence, Iterable)
_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: """text (in quotes, '"3"', where it looks like something else)""",
    NoneType: "null",
}


def refuse_misfits(what: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Refuse a plain value whose type contradicts a simple annotation: ``"False"`` for a ``bool`` would count as true.

    Simple are ``bool``, ``int``, ``float``, ``str``, ``None``, lists of these, and unions. A parameter without an
    annotation, or with another one, takes any value; one whose default contradicts it (``x: int = None``) that, too.

    Args:
        what: the function is, for the message: ``model 'vit'``.
        function: a function or class.
        arguments: what it is to be called with, by name.

    Raises:
        EspalierError: the first argument that does not fit; the message says what would.
    """
    parameters = inspect.signature(function).parameters
    for name, value in arguments.items():
        parameter = parameters.get(name)
        if parameter is None or type(value) not in _PLAIN:
            continue
        fits = partial(_fits, kind=(kind := _annotation(function, parameter)))
        if not fits(value) and not (type(value) is type(parameter.default) and not fits(parameter.default)):
            raise EspalierError(f"{what}: argument {name!r} is {value!r:.100}: give {_words(kind)}")


def _annotation(function: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    """Return the type that a parameter states, ``Any`` if it states none or one that cannot be found."""
    if isinstance(parameter.annotation, str):
        while isinstance(function, partial):
            function = function.func
        maker = inspect.unwrap(function.__init__ if isinstance(function, type) else function)  # type: ignore[misc]
        # One by one: a name that only type checkers import must not hide the others.
        alone = SimpleNamespace(__annotations__={"it": parameter.annotation})
        with suppress(Exception):
            return typing.get_type_hints(alone, globalns=getattr(maker, "__globals__", {}))["it"]
        return Any
    return Any if parameter.annotation is parameter.empty else parameter.annotation


def _fits(value: Any, kind: Any) -> bool:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:  # which of them, its owner says in better words
        return any(type(value) is type(part) for part in parts)
    if isinstance(value, str) and (kind in _LISTS[2:] or origin in _LISTS[2:]):
        return True
    if kind in _LISTS or origin in _LISTS:
        return isinstance(value, tuple | list) and all(map(_fits, value, _parts(parts, value)))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind in (bool, int, str):
        return type(value) is kind
    return value is None if kind in (None, NoneType) else True


def _parts(parts: tuple[Any, ...], values: Sequence[Any]) -> Sequence[Any]:
    """Return the type of each of several values; a number of them that is wrong is the function's to refuse."""
    if len(parts) == 1 or parts[1:] == (...,):
        return parts[:1] * len(values)
    return parts if len(parts) == len(values) else [Any] * len(values)


def _words(kind: Any) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(_words, parts)))
    if origin is Literal:
        return f"one of {', '.join(map(repr, parts))}"
    if kind in _LISTS or origin in _LISTS:
        return "a list such as [1, 2]"
    return _WORDS.get(kind if kind is not None else NoneType, getattr(kind, "__name__", str(kind)))
