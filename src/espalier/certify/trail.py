"""What a network did in one pass: its operations with their constants, to be compared with another pass.

A bound is about one map. A network that draws random numbers, counts its calls or changes its own weights is another
one at every call, and where that shows only far from the images (behind an activation that is zero there), its scores
do not tell. The constants of its operations do: they must be the same in every pass, whatever they come from. So must
what its modules keep when a pass is over: a count may show only after more calls than there are passes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from espalier.certify.counts import ImageCount


class Trail:
    """A digest that grows with every operation.

    Args:
        by_type: classes of things that are noted by their type alone, as everything is that has no contents here.
    """

    def __init__(self, *by_type: type) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self._by_type = by_type
        self._met: set[int] = set()

    def add(self, *items: Any) -> None:
        """Note names, numbers, tensors by their contents, and other things by their type, such as bounds of values."""
        for item in items:
            if isinstance(item, self._by_type):
                self._note(type(item).__name__)
            elif isinstance(item, ImageCount):
                self._note("N")
            elif isinstance(item, Tensor):
                self._tensor(item)
            elif isinstance(item, set | frozenset):  # in no order
                self._note("set", *sorted(map(repr, item)))
            elif isinstance(item, np.ndarray):
                self._note(f"{item.shape} {item.dtype}", item.tobytes().hex() if item.dtype != object else "")
            elif isinstance(item, nn.Module) or _of_users(item):
                self._object(item)
            elif isinstance(item, list | tuple):
                self._note(f"{type(item).__name__} of {len(item)}", *item)
            elif isinstance(item, dict):
                self._note(f"{len(item)} named", *item.items())
            elif isinstance(item, slice):
                self._note("slice", item.start, item.stop, item.step)
            elif item is None or isinstance(item, bool | int | float | complex | str | torch.dtype | torch.device):
                self._hash.update(f"{type(item).__name__} {item!r};".encode())
            else:
                self._hash.update(f"{type(item).__name__};".encode())

    def add_module(self, module: nn.Module) -> None:
        """Note all that a module can be set to: its tensors and its attributes, and those of the modules inside."""
        for part in module.modules():
            # What torch.compile put there computes the same, and is in no copy, or another in each.
            if type(part).__module__.startswith("torch._dynamo"):
                continue
            kept = {name: item for name, item in vars(part).items() if name not in ("_modules", "_compiled_call_impl")}
            self.add(type(part).__qualname__, kept)

    def _object(self, item: Any) -> None:
        """Note an object that is kept somewhere in an attribute, once: it may lead back to itself."""
        if id(item) in self._met:
            return
        self._met.add(id(item))
        if isinstance(item, nn.Module):
            self.add_module(item)
        else:
            self._note(type(item).__qualname__, vars(item))
        self._met.discard(id(item))

    def _note(self, first: str, *items: Any) -> None:
        self._hash.update(first.encode() + b";")
        self.add(*items)

    def _tensor(self, tensor: Tensor) -> None:
        tensor = tensor.detach()
        self._hash.update(f"{tuple(tensor.shape)} {tensor.dtype};".encode())
        if tensor.numel() and tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta:
            numbers = tensor.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
            self._hash.update(numbers.view(torch.uint8).numpy().data)

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

    def before(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Look at what an operation is given, and return what ``after`` is to know."""

    def after(self, func: Callable[..., Any], given: Any, args: tuple[Any, ...], result: Any) -> None:
        """Look at what an operation made."""

    def layer(self, path: str, given: Any, made: Any) -> None:
        """Look at what a layer made of a value with a bound by its own rule."""

    def module(self, path: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a module on plain tensors."""
        return forward(*args, **kwargs)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do an operation."""
        kwargs = kwargs or {}
        if self.depth:
            return func(*args, **kwargs)
        with self.aside():
            given = self.before(func, args, kwargs)
            result = func(*args, **kwargs)
            self.after(func, given, args, result)
        return result


def state_of(net: nn.Module) -> bytes:
    """Return a digest of all that a network is set to."""
    trail = Trail()
    trail.add_module(net)
    return trail.digest()


def _of_users(item: Any) -> bool:
    """Return whether an object is a user's, with settings or counts in its attributes: libraries keep caches there."""
    home = type(item).__module__.partition(".")[0]
    own = hasattr(item, "__dict__") and not isinstance(item, type) and not callable(item)
    libraries = ("torch", "espalier", "builtins", "numpy")
    return own and (home not in libraries or type(item).__name__ == "SimpleNamespace")
