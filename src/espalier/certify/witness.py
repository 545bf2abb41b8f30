"""Whether a network does on plain tensors what it did on values with bounds, operation by operation.

What is proved is about the operations of a pass on values with bounds (``espalier.certify.bounded``). A network can
tell such a pass from a user's: gradients are off, the values are of another class, the number of images is no ``int``,
names that were one tensor are two. Where it branches on any of that, and the branches differ only far from the images,
its scores do not tell. So the operations of one pass are written down, each with the numbers of the values that it is
given and with its constants, and plain passes, with and without gradients, must do the same ones in that order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from espalier.certify.bounded import Analysis, Bounded, bounded_in
from espalier.certify.counts import ImageCount, eager_calls
from espalier.certify.operations import OPERATIONS, full_name, in_place
from espalier.certify.refusal import UncertifiableError
from espalier.certify.trail import Trail, Watch

IMAGES = 5
"""In the passes that are compared: few, and not a size that networks are likely to have besides."""

_COUNT, _VALUE, _CONSTANT, _SHOWN = "number of images", "value", "constant", "constant of every image"


class _Step(NamedTuple):
    what: str
    """The name of an operation, or the path of a layer that is bounded by its own rule."""
    given: Any
    """Its arguments, as ``_described``."""
    made: tuple[int, ...]
    """The numbers of the values that it made or changed; −1 for a constant, −2 for what nothing may use (the indices of
    a sort)."""


class Record(Watch):
    """Writes down the steps of a pass on values with bounds, which begins with ``first``."""

    def __init__(self, first: Bounded) -> None:
        super().__init__()
        self.steps: list[_Step] = []
        self._values: dict[int, tuple[int, Bounded]] = {}
        self.number(first)

    def number(self, item: Any) -> int:
        """Return the number of a value, in the order in which they were made."""
        if not isinstance(item, Bounded):
            return -1 if isinstance(item, Tensor) else -2
        return self._values.setdefault(id(item), (len(self._values), item))[0]

    def before(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what an operation on values is given, before it can change that."""
        return None if next(bounded_in((args, kwargs)), None) is None else self._described((args, kwargs))

    def after(self, func: Callable[..., Any], given: Any, args: tuple[Any, ...], result: Any) -> None:
        """Write down an operation that was done, unless it was a question about a value."""
        made = _made(func, args, result)
        if given is not None and any(isinstance(item, Tensor) for item in made):
            self.steps.append(_Step(full_name(func), given, tuple(map(self.number, made))))

    def layer(self, path: str, given: Any, made: Any) -> None:
        """Write down a layer."""
        if not self.depth:
            self.steps.append(_Step(path, self._described(given), (self.number(made),)))

    def _described(self, item: Any) -> Any:
        if isinstance(item, Bounded):
            return self._described_value(item)
        if isinstance(item, ImageCount):
            return _COUNT, None
        if isinstance(item, dict):
            return {name: self._described(part) for name, part in item.items()}
        parts = _parts(item)
        return (_CONSTANT, _digest(item)) if parts is None else [self._described(part) for part in parts]

    def _described_value(self, value: Bounded) -> tuple[str, Any]:
        if id(value) in self._values:
            return _VALUE, self.number(value)
        bound = value.bound
        if bound.lipschitz or bound.growth or bound.value is None or bound.error is None or bool(bound.error.any()):
            raise value.analysis.refuse("it uses a value that was made where nobody watched: in a thread of its own?")
        return _SHOWN, _digest(bound.value[0])


class Witness(Watch):
    """Follows a plain pass along the steps of a record, and refuses the first that is another.

    Args:
        analysis: knows the path of the present module.
        record: of a pass on values with bounds.
        images: what the plain pass is given: the numbers that were the first value.
    """

    def __init__(self, analysis: Analysis, record: Record, images: Tensor) -> None:
        super().__init__()
        self.analysis, self.images = analysis, len(images)
        self.failed: UncertifiableError | None = None
        self._steps = iter(record.steps)
        self._next = next(self._steps, None)
        self._values: dict[int, Tensor] = {}
        self._known: dict[int, Tensor] = {}  # keeps them alive, so that no other tensor gets their identity
        self._memory: set[int] = set()
        self._keep(0, images)

    def refused(self, what: str) -> UncertifiableError:
        """Return the refusal of what a plain pass does, and keep it: the network may catch it."""
        error = self.analysis.refuse(
            f"{what} on plain tensors, and not on values with bounds: does it ask whether gradients are on, what type "
            "something has, or whether two names are one tensor?"
        )
        self.failed = self.failed or error
        return error

    def touches(self, tensors: Iterable[Tensor]) -> bool:
        """Return whether one of some tensors is, or shares its memory with, a value of this pass."""
        return any(id(tensor) in self._known or _memory(tensor) in self._memory for tensor in tensors)

    def before(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the next step if the operation is that, and False if it is another one on values."""
        if not self.touches(_tensors((args, kwargs))):
            return None
        name, step = full_name(func), self._next
        if in_place(name)[0] not in OPERATIONS:
            raise self.refused(f"it does {name}")
        return step if step and step.what == name and self._alike(step.given, (args, kwargs)) else False

    def after(self, func: Callable[..., Any], given: Any, args: tuple[Any, ...], result: Any) -> None:
        """Take the results of an operation for what the step made, unless it was a question about a value."""
        made = _made(func, args, result)
        if given is None or not any(isinstance(item, Tensor) for item in made):
            return
        if given is False:
            raise self.refused(f"it does {full_name(func)}")
        self._take(given, made)

    def module(self, path: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a module, as one step if it was that."""
        step = self._next
        one = step and step.what == path and len(args) == 1 and not kwargs and self._alike(step.given, args[0])
        if self.depth or step is None or not one:
            return forward(*args, **kwargs)
        with self.aside():
            result = forward(*args)
            self._take(step, [result])
        return result

    def finish(self, result: Any, last: int) -> None:
        """Refuse a pass that did less, did not return the value of that number, or went on after a refusal."""
        if self.failed is None and self._next is not None:
            self.refused(f"it leaves out {self._next.what}")
        if self.failed is None and (last < 0 or self._values.get(last) is not result):
            self.refused("it returns another value")
        if self.failed is not None:
            raise self.failed

    def _take(self, step: _Step, made: list[Any]) -> None:
        if len(made) != len(step.made):
            raise self.refused(f"{step.what} makes {len(made)} things")
        for number, item in zip(step.made, made, strict=True):
            if number == -1 and self.touches(_tensors([item])):
                raise self.refused(f"{step.what} makes what depends on the image")
            if isinstance(item, Tensor) and number != -1:
                self._keep(number, item)
        self._next = next(self._steps, None)

    def _keep(self, number: int, tensor: Tensor) -> None:
        self._values[number] = self._known[id(tensor)] = tensor
        self._memory.add(_memory(tensor))

    def _alike(self, theirs: Any, item: Any) -> bool:
        """Return whether an argument is the one of a step."""
        if isinstance(item, dict):
            same = isinstance(theirs, dict) and list(theirs) == list(item)
            return same and all(self._alike(theirs[name], part) for name, part in item.items())
        parts = _parts(item)
        if parts is not None:
            same = isinstance(theirs, list) and len(theirs) == len(parts)
            return same and all(map(self._alike, theirs, parts))
        if not isinstance(theirs, tuple):
            return False
        kind, which = theirs
        if kind == _COUNT:
            return type(item) is int and item == self.images
        if kind == _VALUE:
            return self._values.get(which) is item
        if isinstance(item, Tensor) and self.touches([item]):
            return False
        if kind == _SHOWN:
            shown = isinstance(item, Tensor) and item.shape[:1] == (self.images,)
            return shown and which == _digest(item[0]) and torch.equal(item, item[:1].expand_as(item))
        return bool(which == _digest(item))


class _Underneath(TorchDispatchMode):
    """Sees what is done to the values of a plain pass where functions are hidden from modes."""

    def __init__(self, witness: Witness) -> None:
        super().__init__()
        self.witness = witness

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, witness = kwargs or {}, self.witness
        if not witness.depth:
            with witness.aside():
                if witness.touches(_tensors((args, kwargs))):
                    raise witness.refused(f"it does {func}, hidden from view,")
        return func(*args, **kwargs)


def compare_plain_passes(net: nn.Module, analysis: Analysis, images: Tensor) -> None:
    """Hold that a network does on plain tensors, with and without gradients, what it does on values with bounds.

    Args:
        net: a prepared network.
        analysis: of earlier passes of it.
        images: (N, …) in its precision; a few of them are taken.

    Raises:
        UncertifiableError: it does something else, or fails.
    """
    images = images[torch.arange(IMAGES, device=images.device) % len(images)]
    first = analysis.start(images)
    record = Record(first)
    last = record.number(analysis.run(net, first, record))

    def wants_gradient() -> Tensor:
        return images.clone().requires_grad_()

    passes: tuple[tuple[Any, Callable[[], Tensor]], ...] = (
        (torch.no_grad(), images.clone), (torch.enable_grad(), images.clone), (torch.enable_grad(), wants_gradient),
        (torch.enable_grad(), lambda: wants_gradient().clone()), (torch.inference_mode(), images.clone),
    )  # fmt: skip
    for context, start in passes:
        with context:
            witness = Witness(analysis, record, x := start())
            analysis.watch = witness
            try:
                with eager_calls(), _Underneath(witness), witness:
                    result = net(x)
            except Exception as error:
                if witness.failed is None and not isinstance(context, torch.no_grad):
                    continue  # it cannot be run like that: no prediction could be wrong
                raise witness.failed or UncertifiableError(
                    f"it fails on plain tensors: {type(error).__name__}: {error}", type(net).__name__
                ) from error
            finally:
                analysis.watch = Watch()
            witness.finish(result, last)


def _made(func: Callable[..., Any], args: tuple[Any, ...], result: Any) -> list[Any]:
    """Return what an operation made or changed."""
    changed = args[:1] if in_place(full_name(func))[1] else ()
    return [*(result if isinstance(result, list | tuple) else [result]), *changed]


def _tensors(items: Any) -> Iterator[Tensor]:
    for item in items:
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, list | tuple):
            yield from _tensors(item)
        elif isinstance(item, dict):
            yield from _tensors(item.values())


def _parts(item: Any) -> list[Any] | None:
    """Return what an argument consists of, or None if it is one thing."""
    if isinstance(item, slice):
        return ["slice", item.start, item.stop, item.step]
    return list(item) if isinstance(item, list | tuple) else None


def _memory(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse tensors, and others without memory
        return -id(tensor)


def _digest(item: Any) -> bytes:
    trail = Trail()
    trail.add(item)
    return trail.digest()
