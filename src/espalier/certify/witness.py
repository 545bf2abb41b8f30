"""Whether a network does on plain tensors what it did on values with bounds, operation by operation.

What is proved is about the operations of a pass on values with bounds (``espalier.certify.bounded``). A network can
tell such a pass from a user's: gradients are off, the values are of another class, the number of images is no ``int``,
names that were one tensor are two. Where it branches on any of that, and the branches differ only far from the images,
its scores do not tell. So the operations of one pass are written down, each with the numbers of the values that it is
given and with its constants. Plain passes in every way that a user may call the network must do the same ones in that
order; copies and views that keep a value as it is are free.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from espalier.certify import steps
from espalier.certify.bounded import Analysis
from espalier.certify.counts import REPEAT, PlainCount, at_count, has_count
from espalier.certify.operations import OPERATIONS, Call, last_name, tensors_in
from espalier.certify.refusal import UncertifiableError
from espalier.certify.surroundings import interference
from espalier.certify.trail import Watch, digest_of

Layers = dict[tuple[Any, ...], tuple[Tensor, bool]]
"""By number, context and kind of input: what a layer made, and whether that wants a gradient."""


class _Held(NamedTuple):
    tensor: Tensor
    numbers: set[int]
    """The values of the record that it holds: two of them can be one tensor here."""
    version: int


class Witness(Watch):
    """Follows a plain pass along the steps of a record, and refuses the first that is another.

    Args:
        analysis: knows the path of the present module.
        record: of a pass on values with bounds.
        images: what the plain pass is given: the numbers that were the first value.
        layers: what layers that are one step made of the same images in passes before.
        counted: whether the number of images is an ``int`` that can be read.
        answers: what ``is_contiguous`` says one time after the other, and then True; the truth if none is given.
    """

    def __init__(
        self,
        analysis: Analysis,
        record: steps.Record,
        images: Tensor,
        layers: Layers,
        *,
        counted: bool = False,
        answers: Sequence[bool] | None = None,
    ) -> None:
        super().__init__()
        self.analysis, self.images, self.layers, self.answers = analysis, len(images), layers, answers
        self.answered: list[bool] = []
        self.count = None if counted else PlainCount(len(images))
        if self.count is not None:
            self.count.refused = lambda name: self.refused(f"{last_name(name)} reads the number of images")
        self.refuse = self.refused
        self.failed: UncertifiableError | None = None
        self.allowed: set[int] | None = None
        """The memory of the operands of the operation that is being done; None: it is ours or a layer's."""
        self._steps = iter(record.steps)
        self._next = next(self._steps, None)
        self._held: dict[int, _Held] = {}  # keeps tensors alive, so that no other one gets their identity
        self._places: dict[tuple[Any, ...], set[int]] = {}
        self._memory: set[int] = set()
        self._shown: dict[int, Tensor] = {}  # constants that were made with the number of images
        self._keep(images, {0})

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
        return any(id(tensor) in self._held or _memory(tensor) in self._memory for tensor in tensors)

    def operation(self, call: Call) -> Any:
        """Do an operation, if it is the next step, keeps a value, asks something about one, or is given none."""
        step = self._step_of(call)
        try:
            result = self._do(call)
        except Exception:
            if step is False and call.last not in (*steps.KEEPS, *steps.HOOKS):  # with other images it may not fail
                self.refused(f"it tries {call.full}")
            raise
        if step is None and has_count(call.args, call.kwargs) and isinstance(result, Tensor):
            self._shown[id(result)] = result
        if step is None:
            return self._answer(call, result) if call.args and id(call.args[0]) in self._shown else result
        made = steps.things_made(call, result)
        if call.last in steps.HOOKS:
            return result
        if (call.name in OPERATIONS or call.last in steps.KEEPS) and not any(isinstance(item, Tensor) for item in made):
            return self._answer(call, result)
        if steps.keeps(call, result):
            if self.touches([call.args[0]]):
                self._keep(result, self._numbers_of(call.args[0]))
        elif step is False:
            raise self.refused(f"it does {call.full}")
        else:
            self._take(step, made, overwrites=call.writes or bool(call.kwargs.get("inplace")))
        return result

    def _step_of(self, call: Call) -> steps.Step | Literal[False] | None:
        """Return the next step if an operation is that, False if it is another one on values, None without values."""
        tensors, step = list(tensors_in(call.args, call.kwargs)), self._next
        used = self.touches(tensors)
        counts = call.full in steps.COUNTS and (used or id(call.args[:1] and call.args[0]) in self._shown)
        if counts or (not used and call.full not in REPEAT and has_count(call.args, call.kwargs)):
            raise self.refused(f"{call.last if counts else call.full} reads the number of images")
        if not used:
            return None
        constants = (tensor for tensor in tensors if id(tensor) not in self._held)
        if reason := interference(constants, tensors[0].device.type, self.analysis.modes):
            raise self.refused(f"{call.full} {reason},")
        if step is None or step.what != steps.step_name(call):
            return False
        return step if self._alike(step.given, steps.arguments_of(call)) else False

    def _do(self, call: Call) -> Any:
        """Do an operation; code that it calls may touch no other values."""
        self.allowed, before = {_memory(tensor) for tensor in tensors_in(call.args, call.kwargs)}, self.allowed
        if has_count(call.args, call.kwargs):  # Python functions of torch compute with it
            call = at_count(call, self.images)
        try:
            return call.run()
        finally:
            self.allowed = before

    def module(self, path: str, module: nn.Module, call: Call) -> Any:
        """Run a module, as one step if it was that."""
        step = self._next
        if self.depth or step is None or step.what != path or len(call.args) != 1 or call.kwargs:
            return call.run()
        with self.aside():
            x = call.args[0]
            if not self._alike(step.given, x):
                raise self.refused("it is given another value")
            alike = map(_same, step.computed, steps.computed_in(module)) if step.computed else ()
            if digest_of(module) != step.state or not all(alike):
                raise self.refused("it is set to something else")
            if reason := interference((), x.device.type, self.analysis.modes, layer=True):
                raise self.refused(f"it {reason}")
            key = step.made[0], torch.is_grad_enabled(), x.requires_grad, x.is_inference()
            # Its code is known, and takes longest with gradients: once for every kind of input is enough.
            if key in self.layers and len(self.layers[key][0]) >= self.images:
                value, wants = self.layers[key]
                result = value[: self.images] + torch.zeros_like(value[0], requires_grad=wants)
            else:
                result = call.run()
                self.layers[key] = result.detach().clone(), result.requires_grad
            self._take(step, [result])
        return result

    def finish(self, result: Any, last: int) -> None:
        """Refuse a pass that did less, did not return the value of that number, or went on after a refusal."""
        with self.aside():
            if self.failed is None and self._next is not None:
                self.refused(f"it leaves out {self._next.what}")
            if self.failed is None and last not in self._numbers_of(result):
                self.refused("it returns another value")
        if self.failed is not None:
            raise self.failed

    def _answer(self, call: Call, result: Any) -> Any:
        """Return what was asked about a value, with a number of images that cannot be read."""
        if call.last == "is_contiguous":
            place = len(self.answered)
            if self.answers is not None:
                result = self.answers[place] if place < len(self.answers) else True
            self.answered.append(result)
        if self.count is None or (call.last != "size" and call.full != "torch.Tensor.shape.__get__"):
            return result
        if isinstance(result, tuple):
            return torch.Size((self.count, *result[1:])) if result else result
        dim = call.args[1] if len(call.args) > 1 else call.kwargs["dim"]
        return self.count if dim in (0, -call.args[0].ndim) else result

    def _take(self, step: steps.Step, made: list[Any], *, overwrites: bool = False) -> None:
        if len(made) != len(step.made):
            raise self.refused(f"{step.what} makes {len(made)} things")
        for number, item in zip(step.made, made, strict=True):
            if number == -1 and self.touches(tensors_in(item)):
                raise self.refused(f"{step.what} makes what depends on the image")
            if isinstance(item, Tensor) and number != -1:
                numbers = {number}
                held = self._held.get(id(item))
                if held and not overwrites and held.version == _version(item):
                    numbers |= held.numbers  # the operand came back as it was
                else:
                    self._forget(item)
                self._keep(item, numbers)
        self._next = next(self._steps, None)

    def _forget(self, changed: Tensor) -> None:
        """Hold nothing of what shares its memory with a value that was written any more for what it was."""
        memory = _memory(changed)
        if id(changed) in self._held:
            for key, held in self._held.items():
                if _memory(held.tensor) == memory:
                    self._held[key] = held._replace(numbers=set())
            self._places = {place: numbers for place, numbers in self._places.items() if place[0] != memory}

    def _keep(self, tensor: Tensor, numbers: set[int]) -> None:
        self._held[id(tensor)] = _Held(tensor, numbers, _version(tensor))
        self._places[_place(tensor)] = numbers
        self._memory.add(_memory(tensor))

    def _numbers_of(self, tensor: Any) -> set[int]:
        """Return the values of the record that a tensor holds."""
        if not isinstance(tensor, Tensor):
            return set()
        if id(tensor) not in self._held:  # torch puts views around hooks
            return self._places.get(_place(tensor), set())
        held = self._held[id(tensor)]
        if held.version != _version(tensor):
            raise self.refused("numbers are changed where nobody is to see it")
        return held.numbers

    def _alike(self, theirs: Any, item: Any) -> bool:
        """Return whether an argument is the one of a step."""
        if isinstance(item, dict):
            same = isinstance(theirs, dict) and list(theirs) == list(item)
            return same and all(self._alike(theirs[name], part) for name, part in item.items())
        parts = steps.parts_of(item)
        if parts is not None:
            same = isinstance(theirs, list) and len(theirs) == len(parts)
            return same and all(map(self._alike, theirs, parts))
        if not isinstance(theirs, tuple):
            return False
        kind, which = theirs
        if kind == steps.COUNT:
            return isinstance(item, int) and int.__eq__(item, self.images) is True
        if not isinstance(item, Tensor):
            return kind == steps.CONSTANT and not isinstance(which, Tensor) and which == steps.constant_of(item)
        if kind == steps.VALUE:
            return which in self._numbers_of(item)
        if not isinstance(which, Tensor) or self.touches([item]):
            return False
        if kind == steps.SHOWN:
            shown = item.shape == (self.images, *which.shape)
            return shown and all(_same(which, row) for row in item)
        return _same(which, item)


class Underneath(TorchDispatchMode):
    """Sees what is done to the values of a plain pass where functions are hidden from modes."""

    def __init__(self, witness: Witness) -> None:
        super().__init__()
        self.witness = witness

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, witness = kwargs or {}, self.witness
        if not witness.depth or witness.allowed is not None:
            with witness.aside():
                touched = [tensor for tensor in tensors_in(args, kwargs) if witness.touches([tensor])]
                others = {_memory(tensor) for tensor in touched} - (witness.allowed or set())
                # Torch itself makes views of what goes through a function with gradients of its own.
                view = func in (
                    torch.ops.aten.view.default,
                    torch.ops.aten.alias.default,
                    torch.ops.aten.detach.default,
                )
                if others and not (view and not witness.allowed):
                    raise witness.refused(f"it does {func}, hidden from view,")
        return func(*args, **kwargs)


def _memory(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse tensors, and others without memory
        return -id(tensor)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    if tensor.layout != torch.strided:
        return (id(tensor),)
    return _memory(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _same(one: Tensor, other: Tensor) -> bool:
    """Return whether two constants are equal within 500 roundings of each number and 16 of the largest.

    LAPACK computes some in another way if gradients are wanted or modes are active.
    """
    if one.shape != other.shape or one.dtype != other.dtype or one.layout != other.layout:
        return False
    if torch.equal(one, other):
        return True
    if not one.is_floating_point() or not one.numel():
        return False
    most = torch.finfo(one.dtype).eps * (500 * one.abs() + 16 * one.abs().max())
    return bool(((one - other).abs() <= most).all())
