"""Whether a network does on plain tensors what it did on values with bounds, operation by operation.

What is proved is about the operations of a pass on values with bounds (``espalier.certify.bounded``). A network can
tell such a pass from a user's: gradients are off, the values are of another class, the number of images is no ``int``,
names that were one tensor are two. Where it branches on any of that, and the branches differ only far from the images,
its scores do not tell. So the operations of one pass are written down, each with the numbers of the values that it is
given and with its constants. Plain passes in every way that a user may call the network must do the same ones in that
order; copies and views that keep a value as it is are free.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from espalier.certify import steps
from espalier.certify.bounded import Analysis
from espalier.certify.counts import REPEAT, PlainCount, at_count, eager_calls, has_count
from espalier.certify.operations import OPERATIONS, Call, last_name, tensors_in
from espalier.certify.refusal import UncertifiableError
from espalier.certify.surroundings import interference, modes
from espalier.certify.trail import Watch, digest_of

IMAGES = 5
"""In the pass that is written down: few, and not a size that networks are likely to have besides."""

_MOST, _MANY, _NUMBERS = 8, 70, 400_000
"""In plain passes: in most of them, and in some if the images are small enough."""


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
    """

    def __init__(
        self, analysis: Analysis, record: steps.Record, images: Tensor, layers: Layers, *, counted: bool = False
    ) -> None:
        super().__init__()
        self.analysis, self.images, self.layers = analysis, len(images), layers
        self.count = None if counted else PlainCount(len(images))
        if self.count is not None:
            self.count.refused = lambda name: self.refused(f"{last_name(name)} reads the number of images")
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
            if digest_of(module) != step.state:
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


class _Underneath(TorchDispatchMode):
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


def _kinds(images: Tensor) -> Iterator[tuple[Tensor, bool]]:
    """Yield images as users give them to a network, and whether their number may be read."""
    yield images.clone(), True
    yield images[:5].clone(), False
    for wanted in (False, True):  # not contiguous
        yield torch.stack([images, images], -1).flatten(-2)[..., ::2].requires_grad_(wanted), False
    if images.ndim == 4:
        yield images.clone(memory_format=torch.channels_last), False
    elif images.ndim > 1:  # the numbers of an image as rows: dense, and not contiguous
        yield images.transpose(0, -1).contiguous().transpose(0, -1), False
    leaf = images[:6].clone().requires_grad_()
    yield leaf, False
    with torch.enable_grad():
        yield leaf + 0.0, False
    parameter = nn.Parameter(images[:5].clone())
    parameter.grad = torch.zeros_like(parameter)
    yield parameter, True
    with torch.inference_mode():
        made = images.clone()
    yield made, False


def compare_plain_passes(net: nn.Module, analysis: Analysis, images: Tensor) -> None:
    """Hold that a network does on plain tensors what it does on values with bounds, in every way that users call it.

    Args:
        net: a prepared network.
        analysis: of earlier passes of it.
        images: (N, …) in its precision; a few of them are taken.

    Raises:
        UncertifiableError: it does something else, or fails on plain tensors.
    """
    images = images.detach()[torch.arange(_MOST, device=images.device) % len(images)]
    first = analysis.start(images[:IMAGES])
    record = steps.Record(first)
    last = record.number(analysis.run(net, first, record))
    layers: Layers = {}
    # From many to few, for what layers made is used again.
    many = images[torch.arange(max(_MOST, min(_MANY, _NUMBERS // images[0].numel())), device=images.device) % _MOST]
    for way in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        for x, counted in ((many, False), *_kinds(images)):
            given = x if x.requires_grad or x.is_inference() or not x.is_contiguous() else x.clone()
            _follow(net, Witness(analysis, record, given, layers, counted=counted), way, given, last)


def _follow(net: nn.Module, witness: Witness, way: Callable[[], Any], x: Tensor, last: int) -> None:
    analysis = witness.analysis
    analysis.watch = witness
    try:
        with warnings.catch_warnings(action="ignore"), way(), eager_calls():
            try:
                with _Underneath(witness), witness:
                    analysis.modes = modes()
                    result = net(x)
            except Exception as error:
                if witness.failed is not None:
                    raise witness.failed from error
                analysis.watch = Watch()
                try:
                    net(x)
                except Exception:
                    return  # it cannot be run like that: no prediction could be wrong
                raise witness.refused(f"it fails where it is watched ({type(error).__name__})") from error
    finally:
        analysis.watch = Watch()
    witness.finish(result, last)


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
