"""The table of operations that a certificate has rules for, by torch's own names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from espalier.certify.refusal import UncertifiableError


class Rule(NamedTuple):
    """What the table holds for one operation; see ``operation``."""

    function: Callable[..., Any]
    """Takes the analysis, the operation's name if it wants that, and the arguments with bounds in place of values."""
    values: int
    alias: bool
    counted: bool
    signature: inspect.Signature

    def bind(self, analysis: Any, name: str, args: Iterable[Any], kwargs: dict[str, Any]) -> inspect.BoundArguments:
        """Return the arguments of the function."""
        named = list(self.signature.parameters)[1] == "name"
        return self.signature.bind(analysis, *([name] if named else []), *args, **kwargs)

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with the operands in front, however they were given."""
        kwargs, front = mapped(as_torch_reads, kwargs), list(mapped(as_torch_reads, args))
        for names in (("input", "self", "tensors"), ("other", "end"))[: self.values]:
            given = [name for name in names if name in kwargs]
            if given and len(front) < self.values:
                front.append(kwargs.pop(given[0]))
        return tuple(front), {name: value for name, value in kwargs.items() if name != "out"}


OPERATIONS: dict[str, Rule] = {}
"""By torch's full name, without the underscore of operations in place."""


def operation(
    *names: str, values: int = 1, alias: bool = False, counted: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter a rule (decorator); a rule of several operations names its second parameter ``name``.

    Args:
        names: ``F.name`` for torch.nn.functional's; ``name`` for torch.name and the method of tensors; a name with
            ``torch.`` as it is. Operations in place have the rule of the others.
        values: how many leading arguments may depend on the image.
        alias: whether the result may share its numbers with the first operand.
        counted: whether an argument may be the number of images, ``espalier.certify.counts.ImageCount``.
    """

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        rule = Rule(function, values, alias, counted, inspect.signature(function))
        for name in names:
            both = (f"torch.{name}", f"torch.Tensor.{name}")
            full = name.replace("F.", "torch.nn.functional.", 1) if name.startswith("F.") else name
            OPERATIONS.update(dict.fromkeys([full] if full.startswith("torch.") else both, rule))
        return function

    return enter


def full_name(function: Callable[..., Any]) -> str:
    """Return torch's name of an operation; what is not torch's gets none that a rule could have."""
    try:
        name = torch.overrides.resolve_name(function)
    except Exception:  # it is not told which errors a callable that it never met can raise
        name = None
    return name or f"the function {getattr(function, '__qualname__', None) or function}".replace(".", " ")


def in_place(name: str) -> tuple[str, bool]:
    """Return the name of the operation that makes a new tensor, and whether this one works in place."""
    if name.endswith(".__get__"):
        return name, False
    last = last_name(name)
    if last.startswith("__i") and last.endswith("__") and last not in ("__index__", "__int__", "__invert__"):
        return name.replace(last, f"__{last[3:]}"), True
    if last.endswith("_") and not last.endswith("__"):
        return name[:-1], True
    return name, False


@dataclass(frozen=True)
class Call:
    """One call of a function of torch."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @cached_property
    def full(self) -> str:
        """See ``full_name``."""
        return full_name(self.function)

    @property
    def last(self) -> str:
        """The name of the operation without where it stands."""
        return last_name(self.full)

    @property
    def name(self) -> str:
        """The name of the operation that makes a new tensor."""
        return in_place(self.full)[0]

    @property
    def writes(self) -> bool:
        """Whether it works in place."""
        return in_place(self.full)[1]

    @property
    def short(self) -> str:
        """The name of the operation or property alone, without where it stands."""
        return last_name(self.name.removesuffix(".__get__"))

    def run(self) -> Any:
        """Do it."""
        return self.function(*self.args, **self.kwargs)


def last_name(name: str) -> str:
    """Return the name of an operation without where it stands."""
    return name.rpartition(".")[2]


def leaves(items: Iterable[Any]) -> Iterator[Any]:
    """Yield what arguments consist of, however deep in lists, dictionaries and slices."""
    for item in items:
        if isinstance(item, list | tuple):
            yield from leaves(_parts(item))
        elif isinstance(item, dict):
            yield from leaves(item.values())
        elif isinstance(item, slice):
            yield from leaves((item.start, item.stop, item.step))
        else:
            yield item


def mapped(change: Callable[[Any], Any], item: Any) -> Any:
    """Return an argument with what it consists of changed, however deep in lists, tuples and dictionaries."""
    if isinstance(item, dict):
        return {name: mapped(change, part) for name, part in item.items()}
    if isinstance(item, list | tuple):
        parts = [mapped(change, part) for part in _parts(item)]
        return parts if isinstance(item, list) else tuple(parts)
    if isinstance(item, slice):
        return slice(*(mapped(change, part) for part in (item.start, item.stop, item.step)))
    return change(item)


def _parts(item: list[Any] | tuple[Any, ...]) -> Iterator[Any]:
    """Yield the parts of a list as torch reads them, past an ``__iter__`` of its own."""
    return list.__iter__(item) if isinstance(item, list) else tuple.__iter__(item)


_PLAIN = (bool, int, float, complex, str, type(None), type(...), type, Tensor, torch.SymInt, torch.dtype, torch.device,
          torch.layout, torch.memory_format)  # fmt: skip


def as_torch_reads(item: Any) -> Any:
    """Return a leaf of an argument as torch reads it: a number of a class of its own is what it holds.

    Raises:
        UncertifiableError: it is neither a number nor a tensor: what torch would make of it is not known.
    """
    for cls in (int, float, complex):
        if isinstance(item, cls) and type(item) not in (cls, bool) and not isinstance(item, torch.SymInt):
            return cls.__pos__(item)  # type: ignore[arg-type]
    if isinstance(item, str) and type(item) is not str:
        return str.__str__(item)
    if isinstance(item, np.generic):
        return np.generic.item(item)
    if not isinstance(item, _PLAIN):
        raise UncertifiableError(f"it is given a {type(item).__name__}: give a plain number or tensor")
    return item


def tensors_in(*items: Any) -> Iterator[Tensor]:
    """Yield the tensors among arguments, however deep."""
    return (item for item in leaves(items) if isinstance(item, Tensor))


def unknown(name: str) -> str:
    """Return why an operation is refused."""
    short = name.removesuffix(".__get__")
    if last_name(short) in _LOOKS:
        return (
            f"{short} looks at the numbers: what is done next would depend on the image, and no bound holds across that"
        )
    return f"nothing is known about {short}: use operations that have a rule, or state the constant of the module"


_LOOKS = {
    "__bool__", "__float__", "__int__", "__index__", "__complex__", "item", "tolist", "numpy", "__array__", "gt", "lt",
    "ge", "le", "eq", "ne", "__eq__", "__ne__", "isnan", "isinf", "isfinite", "allclose", "equal", "argmax", "argmin",
    "nonzero", "where", "__contains__", "any", "all", "data_ptr", "untyped_storage", "storage", "__format__",
}  # fmt: skip
