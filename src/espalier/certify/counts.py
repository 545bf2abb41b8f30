"""The number of images in a batch, as a network meets it while it is bounded: a length, and nothing else.

A certificate is about each image by itself. A network that computes with the number of images gives one image other
scores in other company, and where that shows (behind an activation that is zero at the images, say) no run can tell.
So the number cannot be read: ``x.shape[0]`` is a symbolic integer without a value. It can be the first size of a view,
of a copy or of a constant; arithmetic, comparisons, ``int``, ``range``, ``len`` and every other operation that is given
it are refused by name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from espalier.certify.operations import Call, leaves, mapped

_SHOWN = {
    "__new__", "__init__", "__repr__", "__hash__", "__getattribute__", "__eq__", "__ne__", "__format__", "__doc__",
    "__module__", "__dict__", "__weakref__",
}  # fmt: skip
"""What an integer has besides ways to read it."""


class Count:
    """The number of images: equal to itself, unchanged by 1 as a factor, and otherwise not to be read."""

    refused: Callable[[str], Exception]
    """Returns the refusal of one way to read it."""

    def __repr__(self) -> str:
        """Show a name in place of the number."""
        return "N"

    # As torch's own: libraries that keep what they know of a shape in a dictionary (einops) do without then.
    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        """Return True for itself."""
        if other is self:
            return True
        raise self.refused("==")

    def __ne__(self, other: object) -> bool:
        """Return False for itself."""
        return not self == other


def _unreadable(name: str) -> Callable[..., Any]:
    def method(self: Count, *others: Any) -> Any:
        if name in ("__mul__", "__rmul__", "__floordiv__") and type(others[0]) is int and others[0] == 1:
            return self
        raise self.refused(name.strip("_"))

    return method


for _name, _part in {**vars(torch.SymInt), **vars(int)}.items():
    if _name not in _SHOWN:
        setattr(Count, _name, _unreadable(_name) if callable(_part) else property(_unreadable(_name)))


class ImageCount(Count, torch.SymInt):  # type: ignore[misc]
    """The number of images in a pass on values with bounds."""

    def __init__(self, refuse: Callable[[str], Exception]) -> None:
        self.refuse = refuse
        super().__init__(self)  # torch asks the node for the value, which is refused below

    def __getattr__(self, name: str) -> Any:
        """Refuse what torch asks a symbolic integer for when it wants its value."""
        if name.startswith("__") or name == "node":
            raise AttributeError(name)
        raise self.refused(name)

    def refused(self, name: str) -> Exception:
        """Return the refusal of one way to read it."""
        return self.refuse(
            f"{name.strip('_')} reads the number of images, so that images would meet: use it as the first size of "
            "view, reshape, expand, zeros, ones, full or new_zeros alone"
        )


class PlainCount(Count, int):  # type: ignore[misc]
    """The number of images in a plain pass: to torch and ``isinstance`` an ``int``."""

    __str__ = Count.__repr__

    def __format__(self, spec: str) -> str:
        """Show a name in place of the number."""
        return "N"


def has_count(*items: Any) -> bool:
    """Return whether the number of images is among arguments, however deep."""
    return any(isinstance(item, Count) for item in leaves(items))


def with_count(item: Any, count: int) -> Any:
    """Return an argument with a number in place of the number of images."""
    return mapped(lambda part: count if isinstance(part, Count) else part, item)


def at_count(call: Call, count: int) -> Call:
    """Return a call that is given a number in place of the number of images."""
    return Call(call.function, with_count(call.args, count), with_count(call.kwargs, count))


def another(count: int) -> int:
    """Return a number of images to try an operation on, other than the one at hand and not one."""
    return 2 if count != 2 else 3


def eager_calls() -> AbstractContextManager[Any]:
    """Return a context in which functions that ``torch.compile`` made run as they are written: rules are not traced."""
    compiler = "torch._dynamo" in sys.modules  # which takes seconds to import
    return torch.compiler.set_stance("force_eager") if compiler else nullcontext()


REPEAT = {
    f"torch.{name}" for name in ("zeros", "ones", "full", "broadcast_to", "Tensor.expand", "Tensor.broadcast_to",
                                 "Tensor.new_zeros", "Tensor.new_ones", "Tensor.new_full")
}  # fmt: skip


def repeated(call: Call, images: int) -> Tensor | None:
    """Return a constant that is the same for every one of the images, or None if it is not that, found by trying."""
    if call.full not in REPEAT:
        return None
    other = another(images)
    made, tried = (at_count(call, count).run() for count in (images, other))
    fits = made.ndim > 0 and len(made) == images and len(tried) == other and made.shape[1:] == tried.shape[1:]
    if not (fits and made.is_floating_point() and torch.equal(made, tried[:1].expand_as(made))):
        return None
    return made if torch.equal(tried, tried[:1].expand_as(tried)) else None
