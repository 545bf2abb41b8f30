"""What a network did in one pass: its operations with their constants, to be compared with another pass.

A bound is about one map. A network that draws random numbers, counts its calls or changes its own weights is another
one at every call, and where that shows only far from the images (behind an activation that is zero there), its scores
do not tell. The constants of its operations do: they must be the same in every pass, whatever they come from. So must
what its modules keep when a pass is over: a count may show only after more calls than there are passes.
"""

from __future__ import annotations

import functools
import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FunctionType, GeneratorType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from espalier.certify.counts import ImageCount, has_count
from espalier.certify.operations import Call, leaves
from espalier.certify.refusal import UncertifiableError
from espalier.contents import bytes_in

_DATA = (bool, int, float, complex, str, list, tuple, dict, deque, Tensor, np.ndarray)
_BY_TEXT = (torch.dtype, torch.device, torch.layout, torch.memory_format)
_LIBRARIES = ("torch", "espalier", "builtins", "numpy", "functools")
_NUMBERS = (bool, int, float, complex, str)


class Trail:
    """A digest that grows with every operation.

    Args:
        by_type: classes of things that are noted by their type alone, as everything is that has no contents here.
    """

    functions = True
    """Whether what functions enclose and name counts."""

    def __init__(self, *by_type: type) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self._by_type = by_type
        self._met: set[int] = set()

    def add(self, *items: Any) -> None:
        """Note names, numbers, tensors by their contents, and other things by their type, such as bounds of values."""
        for item in items:
            number = next((cls for cls in _NUMBERS if isinstance(item, cls)), None)
            if isinstance(item, self._by_type) or item is None:
                self._note(type(item).__name__)
            elif isinstance(item, ImageCount):
                self._note("N")
            elif isinstance(item, Tensor):
                self._tensor(item)
            elif isinstance(item, np.ndarray | np.generic):
                contents = item.ravel().tolist() if item.dtype == object else item.tobytes()
                self._note(f"{type(item).__name__} {item.shape} {item.dtype}", contents)
            elif number is not None:  # a class of its own may show another one
                self._note(f"{type(item).__name__} {number.__repr__(item)}")
            elif isinstance(item, bytes | bytearray):
                self._hash.update(item)
            elif isinstance(item, slice):
                self._note("slice", item.start, item.stop, item.step)
            elif isinstance(item, set | frozenset):  # in no order
                self._note("set", *sorted(map(repr, item)))
            elif isinstance(item, MethodType):
                self.add(item.__func__)
                if not isinstance(item.__self__, nn.Module):  # those of the network are noted anyway
                    self.add(item.__self__)
            elif isinstance(item, FunctionType):
                self._function(item)
            elif isinstance(item, GeneratorType):
                frame = item.gi_frame
                self._note("generator", item.gi_yieldfrom, *((frame.f_lasti, frame.f_locals) if frame else ()))
            elif isinstance(item, functools._lru_cache_wrapper):
                found = item.cache_info()  # how often it was asked says nothing about what it answers
                self._note("cache", found.misses, found.currsize, item.__wrapped__)
            elif isinstance(item, list | tuple | deque | dict | nn.Module) or _of_users(item):
                self._object(item)
            elif isinstance(item, _BY_TEXT) or type(item).__module__ == "itertools":
                self._note(repr(item))
            elif isinstance(item, torch.Generator):
                self._note("Generator", item.get_state())
            elif isinstance(item, type) and _home(item) not in _LIBRARIES:
                self._note(item.__qualname__, *(part for part in vars(item).values() if isinstance(part, _DATA)))
            else:
                self._note(type(item).__name__)
                self._pickled(item)

    def add_module(self, module: nn.Module) -> None:
        """Note all that a module can be set to: its tensors and its attributes, and those of the modules inside."""
        for part in module.modules():
            # What torch.compile put there computes the same, and is in no copy, or another in each.
            if type(part).__module__.startswith("torch._dynamo"):
                continue
            names = sorted(vars(part).keys() - {"_modules", "_compiled_call_impl"})
            self.add(type(part).__qualname__, id(type(part)), *((name, vars(part)[name]) for name in names))
            for cls in type(part).__mro__:
                if _home(cls) not in _LIBRARIES:
                    self.add(*(item for name, item in sorted(vars(cls).items()) if not name.startswith("__")))

    def _object(self, item: Any) -> None:
        """Note what holds other things, once: it may lead back to itself."""
        if id(item) in self._met:
            return
        self._met.add(id(item))
        if isinstance(item, nn.Module):
            self.add_module(item)
        else:
            self._note(type(item).__qualname__, id(type(item)))
            if isinstance(item, list | tuple | deque | dict):
                self._note(f"{len(item)} in it", *(item.items() if isinstance(item, dict) else item))
            if type(item) not in (list, tuple, dict):
                self.add(*sorted(getattr(item, "__dict__", {}).items()))
                self.add(*(getattr(item, name, None) for name in _slots(type(item))))
                self._pickled(item)
        self._met.discard(id(item))

    def _pickled(self, item: Any) -> None:
        """Note what pickle keeps of a thing whose state is out of sight, such as an iterator or a source of numbers."""
        ways = ((type(item), name) for name in ("__reduce__", "__reduce_ex__", "__getstate__"))
        own = any(getattr(cls, name, None) is not getattr(object, name, None) for cls, name in ways)
        if own and _home(type(item)) not in ("torch", "espalier"):
            with suppress(Exception):  # it cannot be pickled
                self.add(*item.__reduce_ex__(2)[1:])

    def _function(self, function: FunctionType) -> None:
        """Note what a user's function can read besides its arguments: what it encloses, and what it names."""
        if not self.functions or id(function) in self._met or _home(function) in _LIBRARIES:
            return
        self._met.add(id(function))
        for cell in function.__closure__ or ():
            with suppress(ValueError):  # nothing is in it yet
                self.add(cell.cell_contents)
        self.add(function.__defaults__, function.__kwdefaults__, vars(function))
        known = function.__globals__
        self.add(*(known[name] for name in function.__code__.co_names if name in known))

    def _note(self, first: str, *items: Any) -> None:
        self._hash.update(first.encode() + b";")
        self.add(*items)

    def _tensor(self, tensor: Tensor) -> None:
        tensor = tensor.detach()
        self._hash.update(f"{tuple(tensor.shape)} {tensor.dtype};".encode())
        if tensor.layout != torch.strided:
            tensor = tensor.to_dense()
        if tensor.numel() and not tensor.is_quantized and not tensor.is_meta:
            for piece in bytes_in(tensor):
                self._hash.update(piece)

    def __deepcopy__(self, memo: Any) -> Trail:
        """Return a digest that grows by itself: networks are copied with what watches them."""
        made = Trail(*self._by_type)
        made._hash = self._hash.copy()
        return made

    def digest(self) -> bytes:
        """Return the digest of what was noted so far."""
        return self._hash.digest()


class Watch(TorchFunctionMode):
    """What may follow a pass, operation by operation and layer by layer; this one lets everything go by."""

    def __init__(self) -> None:
        super().__init__()
        self.depth = 0
        """In how many operations, or layers that count as one, the pass is."""
        self.counted: Callable[[Call], Any] | None = None
        """Does what is given the number of images on values with bounds: torch would take a placeholder for it."""
        self.refuse: Callable[[str], Exception] = UncertifiableError
        """Returns the refusal of what a network does, and keeps it."""

    def __deepcopy__(self, memo: Any) -> Watch:
        """Return one that follows nothing: networks are copied with what watches them."""
        return Watch()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Return a context in which nothing counts as an operation of the network."""
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1

    def steps_done(self) -> int:
        """Return how many steps were written down."""
        return 0

    def go_back(self, done: int) -> None:
        """Forget the steps after so many."""

    def operation(self, call: Call) -> Any:
        """Do an operation; what it calls is no operation of the network."""
        return self.do(call)

    def do(self, call: Call) -> Any:
        """Do an operation, or refuse it for the number of images that it is given."""
        return self.counted(call) if self.counted and has_count(call.args, call.kwargs) else call.run()

    def layer(self, path: str, module: nn.Module, given: Any, made: Any) -> None:
        """Look at what a layer made of a value with a bound by its own rule."""

    def module(self, path: str, module: nn.Module, call: Call) -> Any:
        """Run the forward pass of a module on plain tensors."""
        return call.run()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do an operation."""
        call = Call(func, args, kwargs or {})
        if self.depth:
            return self.do(call)
        odd = (item for item in leaves((args, kwargs)) if not isinstance(item, Tensor))
        if thing := next((item for item in odd if hasattr(type(item), "__torch_function__")), None):
            raise self.refuse(f"{call.full} is given a {type(thing).__name__}, which says itself what that means,")
        with self.aside():
            return self.operation(call)


def digest_of(item: Any, *, functions: bool = True) -> bytes:
    """Return a digest of all that something, such as a module, is set to.

    Args:
        item: see ``Trail.add``.
        functions: whether what functions enclose and name counts: copies share it, and may write it.
    """
    trail = Trail()
    trail.functions = functions
    trail.add(item)
    return trail.digest()


def _of_users(item: Any) -> bool:
    """Return whether an object is a user's, with settings or counts in its attributes: libraries keep caches there."""
    own = (hasattr(item, "__dict__") or _slots(type(item))) and not isinstance(item, type)
    return bool(own) and (_home(type(item)) not in _LIBRARIES or type(item).__name__ == "SimpleNamespace")


def _home(thing: Any) -> str:
    return str(getattr(thing, "__module__", None)).partition(".")[0]


def _slots(cls: type) -> list[str]:
    slots = [vars(parent).get("__slots__", ()) for parent in cls.__mro__]
    return [name for names in slots for name in ([names] if isinstance(names, str) else names) if name != "__dict__"]
