"""Whether a module still runs the code of its class: what a rule vouches for is that code, and no other.

What a class consists of is recorded when its rule is entered: every attribute of it and of its parents, the code of
every function, and what its functions name in their own modules, as far as this library reaches. A module passes if
each of these is still what it was, on the class, on a subclass and on the module itself. A subclass may add, and change
what only shows (``extra_repr``), but not override.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterable
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

from torch import Tensor, nn

_SHOWS = {
    "__init__", "__doc__", "__module__", "__qualname__", "__annotations__", "__dict__", "__weakref__", "__repr__",
    "__static_attributes__", "__firstlineno__", "__annotate__", "__annotate_func__", "__annotations_cache__",
    "__parameters__", "__orig_bases__", "__abstractmethods__", "_abc_impl", "__hash__", "__slots__", "__constants__",
    "extra_repr", "reset_parameters", "training", "dump_patches", "__getstate__", "__setstate__", "__deepcopy__",
}  # fmt: skip
_MODULE = ("__getattr__", "__getattribute__")


class _Part(NamedTuple):
    attribute: Any
    codes: tuple[Any, ...]


_RECORDS: dict[type, dict[str, _Part]] = {}


def record(cls: type[nn.Module]) -> None:
    """Record what a class consists of, once."""
    if cls not in _RECORDS:
        own = [parent for parent in cls.__mro__ if parent not in nn.Module.__mro__]
        names = {name for parent in own for name in vars(parent)} - _SHOWS | {*_MODULE, "forward"}
        _RECORDS[cls] = {name: _part(inspect.getattr_static(cls, name, None)) for name in names}


def change(
    module: nn.Module, cls: type[nn.Module], forward: Any, verified: dict[tuple[type, type], str | None]
) -> str | None:
    """Return in words what of a recorded class is no longer its own in a module, or None.

    Args:
        module: the module.
        cls: its class or a parent of it.
        forward: what a call of the module runs.
        verified: what was found of classes before, in the same analysis.
    """
    if getattr(forward, "__func__", None) is not inspect.getattr_static(type(module), "forward", None):
        return "its forward pass was replaced on the instance"
    for name, part in _RECORDS[cls].items():
        if name != "forward" and name in vars(module) and (callable(part.attribute) or part.codes):
            return f"its {name} was replaced on the instance"
    key = type(module), cls
    if key not in verified:
        verified[key] = _changed_class(*key)
    return verified[key]


def change_inside(module: nn.Module) -> str | None:
    """Return what was done to a module inside, which a constant that is stated for the whole does not know, or None.

    Torch's own hooks (weight and spectral norm, pruning) only make a weight.
    """
    everywhere = (nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks)
    for path, part in module.named_modules():
        if part is module:  # what is done around it is counted
            continue
        tables = (*everywhere, part._forward_hooks, part._forward_pre_hooks)
        for hook in (hook for table in tables for hook in table.values()):
            if not str(getattr(hook, "__module__", None)).startswith("torch."):
                return f"{path} inside it has hooks"
        forward = getattr(part.forward, "forward", part.forward)  # a prepared network's own are watched
        if getattr(forward, "__func__", None) is not inspect.getattr_static(type(part), "forward", None):
            return f"the forward pass of {path} inside it was replaced on the instance"
    return None


def is_bare(module: nn.Module) -> bool:
    """Return whether a call of a module runs its forward pass and nothing around it."""
    tables = nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks
    call = type(module).__call__ is nn.Module.__call__ and not vars(module).keys() & {"_call_impl", "__call__"}
    impl = type(module)._call_impl is nn.Module._call_impl
    return call and impl and not any((*tables, module._forward_hooks, module._forward_pre_hooks))


def _changed_class(now: type, then: type) -> str | None:
    for name, part in _RECORDS[then].items():
        found = _part(inspect.getattr_static(now, name, None))
        if found.attribute is not part.attribute or found.codes != part.codes:
            return f"{name} is not the one that {then.__name__} had when its rule was entered"
    return None


def self_declared(cls: type[nn.Module], method: str) -> str | None:
    """Return why a class cannot state the constant of its own forward pass by ``method``, or None if it can.

    It can where the method is at least as derived as ``forward``, and both were written in their class.
    """
    places = {name: next((p for p in cls.__mro__ if name in vars(p)), None) for name in (method, "forward")}
    order = [cls.__mro__.index(place) if place else len(cls.__mro__) for place in places.values()]
    if order[0] > order[1]:
        return f"its {method} is that of a parent, which has another forward pass"
    for name, place in places.items():
        function = inspect.unwrap(vars(place)[name]) if place else None
        if place and isinstance(function, FunctionType) and function.__qualname__ != f"{place.__qualname__}.{name}":
            return f"{name} of {place.__name__} was replaced"
    return None


def _part(attribute: Any) -> _Part:
    functions = [attribute]
    if isinstance(attribute, property):
        functions = [attribute.fget, attribute.fset]
    elif isinstance(attribute, staticmethod | classmethod):
        functions = [attribute.__func__]
    codes: list[Any] = []
    for function in functions:
        while function is not None:
            if isinstance(function, FunctionType):
                enclosed = [id(cell.cell_contents) for cell in function.__closure__ or ()]
                codes += [function.__code__, function.__defaults__, *enclosed, *_named(function, set())]
            function = getattr(function, "__wrapped__", None)
    return _Part(attribute, tuple(codes))


def _named(function: FunctionType, seen: set[int]) -> list[int]:
    """Return the identities of what a function names in its module, and so on through the code of this library."""
    names: Iterable[str] = function.__code__.co_names
    found = _of_torch(Tensor, names)
    if str(function.__module__).partition(".")[0] not in ("torch", "espalier"):
        # Without attributes: a global of that name (``for scale in …``) is another thing. Too slow for every import.
        names = {step.argval for step in dis.get_instructions(function) if step.opname == "LOAD_GLOBAL"}
    for name in sorted(names):
        thing = function.__globals__.get(name)
        if thing is None or id(thing) in seen:
            continue
        seen.add(id(thing))
        found.append(id(thing))
        if isinstance(thing, ModuleType):
            found += _of_torch(thing, function.__code__.co_names)
        if not str(getattr(thing, "__module__", None)).startswith("espalier."):
            continue
        inside = list(vars(thing).values()) if isinstance(thing, type) else [thing]
        for part in inside:
            part = inspect.unwrap(getattr(part, "__func__", part))
            if isinstance(part, FunctionType):
                found += [id(part.__code__), *_named(part, seen)]
    return found


def _of_torch(place: Any, names: Iterable[str]) -> list[int]:
    """Return the identities of what names are in a class, or in a module and the modules that are named in it."""
    found, places = [], [place]
    for each in places:
        tables = [vars(cls) for cls in each.__mro__] if isinstance(each, type) else [vars(each)]
        for name in names:
            thing = next((table[name] for table in tables if name in table), None)
            if thing is not None:
                found.append(id(thing))
            if isinstance(thing, ModuleType) and thing not in places:
                places.append(thing)
    return found
