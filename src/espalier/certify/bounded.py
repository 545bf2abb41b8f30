"""A value of a forward pass that carries what is proved about it, so that a bound sees the operations as they happen.

The images of a batch enter a network as a ``Bounded``: to the network it is a tensor, to torch it is one whose every
operation is looked up in a table of rules. A rule computes the operation on the numbers, as it would have been, and
with it, for h* the map in real arithmetic and ĥ the one that runs,

    ‖h*(x′) − h*(x)‖ ≤ L·‖x′ − x‖                                       for all x, x′
    ‖ĥ(x′) − h*(x′)‖ ≤ a(x) + b·r                                       for all x′ with ‖x′ − x‖ ≤ r

per image x and for every radius r. L and b are numbers, a one number per image: every rule is affine in r, because
‖ĥ(x′)‖ ≤ ‖ĥ(x)‖ + 2a + (L + b)·r. An operation without a rule is refused by name, and so is whatever would look at the
numbers: a branch, a comparison, an index that depends on the input. The number of images cannot be read, either
(``espalier.certify.counts``).

Without numbers (``value`` None) only L is carried, for a network whose image size is not known; what needs to know it
is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from espalier.certify.arithmetic import Norms, add_up, image_norms, room_left, up
from espalier.certify.counts import ImageCount, eager_calls, has_count, repeated
from espalier.certify.digits import try_products
from espalier.certify.operations import (
    OPERATIONS,
    Call,
    full_name,
    leaves,
    mapped,
    tensors_in,
    unknown,
)
from espalier.certify.refusal import UncertifiableError
from espalier.certify.surroundings import interference, modes
from espalier.certify.trail import Trail, Watch
from espalier.certify.value import Bound, Memory, Rows, Run, Term


@dataclass
class Analysis:
    """One pass through a network: what the rules share."""

    rounding: bool = True
    """Whether rounding is wanted beside the constants."""
    norms: Norms = field(default_factory=Norms)
    room: Tensor | None = None
    """(N,): up to which radius nothing overflows."""
    dtype: torch.dtype = torch.float64
    """Of the images."""
    path: list[str] = field(default_factory=list)
    """The modules that are being run, outermost first."""
    notes: dict[str, str] = field(default_factory=dict)
    """Why a module's own rule is not used, by path."""
    calls: int = 0
    """How many modules were run."""
    verified: dict[tuple[type, type], str | None] = field(default_factory=dict)
    """What of a class was changed since its rule was entered, or None."""
    wrappers: dict[str, None] = field(default_factory=dict)
    """What the network, or a part of it, came wrapped in, in order."""
    tried: set[tuple[Any, ...]] = field(default_factory=set)
    """Operations whose products are known to keep their digits."""
    modules: dict[str, tuple[float, float]] = field(default_factory=dict)
    """By path of the innermost modules, their constant, and the rounding error that they add to their result."""
    failed: Exception | None = None
    """The first error of an operation in this pass: a network that catches it would go on unwatched."""
    trail: Trail = field(default_factory=Trail)
    """What was done in this pass."""
    modes: tuple[int, int] = (0, 0)
    """How many modes there are outside of the network."""
    watch: Watch = field(default_factory=Watch)
    """What follows this pass, on values with bounds or on plain tensors."""
    done: bytes | None = None
    """The digest of the first pass."""
    numbers: dict[int, tuple[int, Bound]] = field(default_factory=dict)
    """The values of this pass in the order in which they were made, by what Python knows them by."""
    runs: list[Run] = field(default_factory=list)
    """Of modules whose own constant is asked for."""
    converted: bool = False
    """Whether a value of no size had its precision changed: it is not known by then."""
    over: list[range] = field(default_factory=list)
    """The numbers of values that were made in runs on values of no size, and are not to be met after them."""

    @cached_property
    def count(self) -> ImageCount:
        """The number of images, which cannot be read."""
        return ImageCount(self.refuse)

    def run(self, net: nn.Module, x: Bounded, watch: Watch | None = None) -> Bounded:
        """Run a prepared network on one value, while something may follow what it does.

        Raises:
            UncertifiableError: it went on after an operation that failed, did or kept other things than in the first
                pass, or does not return one value with a bound.
        """
        self.failed, self.trail, self.watch = None, Trail(Bounded), watch or Watch()
        self.runs, self.over, self.converted, self.numbers = [], [], False, {id(x.bound): (0, x.bound)}
        self.watch.counted, self.watch.refuse = self.counted, self.refuse
        with eager_calls(), self.watch:
            self.modes = modes()
            result = net(x)
        if self.failed is not None:
            line = " ".join(f"{type(self.failed).__name__}: {self.failed}".split())[:200]
            raise self.refuse(f"it goes on after an operation that failed, in a way that nobody watches ({line})")
        if isinstance(result, Bounded):
            self.trail.add(self.named(result.bound))
        self.trail.add_module(net)
        self.done = self.done or self.trail.digest()
        if self.trail.digest() != self.done:
            raise self.refuse(
                "run again, it does other operations, or has or keeps other constants: is it random, or does it keep "
                "count or change its own weights (remove_parametrizations fixes them)?"
            )
        if not isinstance(result, Bounded):
            what = "scores that do not depend on the images" if isinstance(result, Tensor) else type(result).__name__
            raise UncertifiableError(f"it returns {what}: one tensor is needed", type(net).__name__)
        self.read(result, "its result")
        return result

    def start(self, images: Tensor | None, shift: float = 0.0) -> Bounded:
        """Return the images as the first value: the identity, off by ``shift`` times their norm if rounded."""
        if images is None:
            return self.probe()
        self.dtype = images.dtype
        self.room = images.new_full((len(images),), math.inf, dtype=torch.float64)
        lost = torch.finfo(images.dtype).tiny * math.sqrt(images[0].numel()) if shift else 0.0
        return Bounded(Bound(images, 1.0, shift * image_norms(images) + lost, shift), self)

    def probe(self) -> Bounded:
        """Return a value of its own, of no known size."""
        return Bounded(Bound(None, 1.0), self)

    def read(self, x: Bounded, what: str) -> Bound:
        """Return the bound of a value, unless its numbers were changed behind its back."""
        if x.version != x.memory.version:
            raise self.refuse(f"{what} reads numbers that were changed in place through another tensor")
        number = self.numbers.get(id(x.bound), (-1,))[0]
        if any(number in numbers for numbers in self.over):
            raise self.refuse(f"{what} reads a value that a module inside kept: give an example=")
        for run in self.runs:
            run.alone = run.alone and (number >= run.begun or x.bound is run.given or x.bound.is_constant)
        return x.bound

    @contextmanager
    def follow(self, given: Bound) -> Iterator[Run]:
        """Return a context in which it is seen whether what is done reads other values than one that it is given."""
        run = Run(given, len(self.numbers))
        self.runs.append(run)
        try:
            yield run
        finally:
            self.runs.remove(run)

    def note(self, label: str, before: Bound, after: Bound) -> None:
        """Keep what one module made of a value, the worst of all its calls."""
        constant = after.lipschitz / before.lipschitz if before.lipschitz > 0 else 0.0
        slack = 0.0
        if after.error is not None and before.error is not None and len(after.error):
            slack = max(0.0, (after.error - constant * before.error).max().item())
        then = self.modules.get(label, (0.0, 0.0))
        self.modules[label] = max(constant, then[0]), max(slack, then[1])

    def combine(
        self,
        value: Tensor,
        terms: Sequence[Term],
        *,
        constant: float | Tensor = 0.0,
        absolute: float | Tensor = 0.0,
        joint: bool = False,
        rows: Rows | None = None,
    ) -> Bound:
        """Return the bound of a result.

        Args:
            value: the result as computed.
            terms: what every operand adds.
            constant: norm of what is added besides, (N,) or one for all: it counts only for overflow.
            absolute: rounding error that does not grow with the operands.
            joint: the operands are parts of the result (as in a concatenation): their changes add in squares.
            rows: see ``Bound``.
        """
        changes = [up(term.factor, term.operand.lipschitz) for term in terms]
        lipschitz = add_up(*changes)
        if joint and len(changes) > 1:
            lipschitz = math.nextafter(math.hypot(*changes), math.inf) * (1 + 2.0**-50)
        dtype = value.dtype
        errors, peaks, tops = [], [], []
        # Numbers below the smallest normal one may be flushed to zero: results, operands, and up to 10¹² weights.
        tiny = torch.finfo(dtype).tiny
        flushed = tiny * math.sqrt(value[0].numel())
        for operand, factor, rounding, peak in terms:
            assert operand.error is not None
            size, slope = operand.size
            high, lost = max(factor, peak), add_up(rounding, tiny * 1e6)
            errors.append((factor * operand.error + lost * size, add_up(up(factor, operand.growth), up(lost, slope))))
            peaks.append(high * size)
            tops.append(high * slope)
            flushed += high * tiny * math.sqrt(operand.numbers[0].numel())
        assert self.room is not None
        room = room_left(torch.stack(peaks).sum(0) + constant, sum(tops), dtype)
        self.room = torch.minimum(self.room.to(room.device), room)
        # The error of a concatenation is bounded by the sum of those of its parts, too: no squares are needed there.
        error = torch.stack([a for a, _ in errors]).sum(0) + absolute + flushed
        return Bound(value, lipschitz, error, add_up(*(b for _, b in errors)), rows)

    def exact(self, x: Bound, value: Tensor | None, factor: float = 1.0) -> Bound:
        """Return the bound of a result that is not rounded: numbers of the operand, in other places or chosen among."""
        if value is None:
            return Bound(None, up(factor, x.lipschitz))
        assert x.error is not None
        return Bound(value, up(factor, x.lipschitz), factor * x.error, up(factor, x.growth))

    def try_products(
        self,
        kind: Any,
        run: Callable[[Tensor, Tensor], Tensor],
        x: Tensor | None,
        weight: Tensor,
        rows_are_outputs: bool,
    ) -> None:
        """Find out whether an operation in float32 keeps its digits, once for its shapes; see ``certify.digits``."""
        if x is None or not self.rounding or not x.numel() or not weight.numel():  # constants alone are asked for
            return
        key = (repr(kind), x.shape, x.stride(), weight.shape, weight.stride())
        if x.dtype == weight.dtype == torch.float32 and key not in self.tried:
            try_products(run, x, weight, rows_are_outputs=rows_are_outputs)
            self.tried.add(key)

    def refuse(self, reason: str) -> UncertifiableError:
        """Return the refusal of what the present module does, and keep it: the network may catch it."""
        where = self.path[-1] if self.path else "the network"
        note = next((self.notes[path] for path in reversed(self.path) if path in self.notes), None)
        error = UncertifiableError(f"{reason} ({note})" if note else reason, where)
        self.failed = self.failed or error
        return error

    def counted(self, call: Call) -> Any:
        """Do an operation that is given the number of images."""
        if next(bounded_in(call.args, call.kwargs), None) is not None:
            return call.run()
        made = None if self.room is None else repeated(call, len(self.room))
        if made is None:
            raise self.count.refused(call.full)
        self.trail.add(call.full, call.args, call.kwargs, made[:1])
        shown = call.last in ("expand", "broadcast_to")
        return Bounded(self.number(self.same_for_all(made)), self, Memory(constant=shown))

    def same_for_all(self, value: Tensor) -> Bound:
        """Return the bound of a constant that is there once for every image."""
        return Bound(value, 0.0, value.new_zeros(len(value), dtype=torch.float64))

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do one operation by its rule."""
        try:
            return self._call(Call(function, args, kwargs))
        except Exception as error:
            self.failed = self.failed or error
            raise

    def _call(self, call: Call) -> Any:
        full, rule = call.full, OPERATIONS.get(call.name)
        if rule is None or call.kwargs.get("out") is not None:
            raise self.refuse(unknown(full))
        if not rule.counted and has_count(call.args, call.kwargs):
            raise self.count.refused(full)
        operands = list(bounded_in(call.args, call.kwargs))
        for operand in operands:
            self.read(operand, full)
        try:
            args, kwargs = rule.arguments(call.args, call.kwargs)
        except UncertifiableError as error:
            raise self.refuse(f"{full}: {error}") from None
        allowed = list(bounded_in(*args[: rule.values]))
        if len(allowed) != len(operands):
            raise self.refuse(f"{full} takes a value that depends on the image where only a constant is known")
        device = next((x.bound.value.device.type for x in operands if x.bound.value is not None), "cpu")
        constants = (item for item in tensors_in(args, kwargs) if not isinstance(item, Bounded))
        if reason := interference(constants, device, self.modes):
            raise self.refuse(f"{full} {reason}")
        try:
            given = rule.bind(self, call.short, mapped(_opened, args), kwargs)
        except TypeError as error:
            raise self.refuse(f"{full} has no rule for these arguments ({error})") from error
        if any(isinstance(item, float) and math.isnan(item) for item in (*given.args, *given.kwargs.values())):
            raise self.refuse(f"{full} is given a number that is NaN")
        try:
            result = rule.function(*given.args, **given.kwargs)
        except UncertifiableError as error:
            raise error if error.module else self.refuse(f"{full}: {error}") from None
        if made := [part for part in leaves([result]) if isinstance(part, Bound)]:
            # What is asked about a value changes nothing, and may be asked once. Values are told by their numbers: what
            # goes where counts, too.
            self.trail.add(full, self.named(given.args[1:]), self.named(given.kwargs))
            for part in made:
                self.number(part)
        if call.writes or given.arguments.get("inplace"):
            if any(other is not args[0] and other.memory is args[0].memory for other in allowed):
                raise self.refuse(f"{full} changes numbers in place that it reads through another tensor")
            return self._assign(full, args[0], result)
        memory = allowed[0].memory if rule.alias else None
        return _closed(result, self, memory)

    def number(self, value: Bound) -> Bound:
        """Give a bound the next number of this pass, unless it has one, and return it."""
        return self.numbers.setdefault(id(value), (len(self.numbers), value))[1]

    def named(self, item: Any) -> Any:
        """Return arguments with the numbers of bounds in their places."""
        known = self.numbers
        return mapped(lambda part: ("bound", known.get(id(part), (-1,))[0]) if isinstance(part, Bound) else part, item)

    def _assign(self, name: str, target: Any, result: Any) -> Any:
        """Change a value in place; other tensors that share its numbers are not to be read any more."""
        if not isinstance(target, Bounded) or not isinstance(result, Bound):
            raise self.refuse(f"{name} writes what depends on the image into a tensor that did not")
        old = target.bound.value
        if old is not None and result.value is not None:
            if old.shape != result.value.shape:
                raise self.refuse(f"{name} would change the shape of its target")
            if old.dtype != result.value.dtype:
                raise self.refuse(f"{name} would change the dtype of its target")
        if target.memory.constant:
            raise self.refuse(f"{name} writes what depends on the image into numbers of the network's own")
        target.memory.version += 1
        target.version = target.memory.version
        target.bound = result
        return target


class Bounded(Tensor):
    """To a network a tensor, to torch's operations a value with a bound."""

    bound: Bound
    analysis: Analysis
    memory: Memory
    version: int

    @staticmethod
    def __new__(cls, bound: Bound, analysis: Analysis, memory: Memory | None = None) -> Bounded:
        """Return a tensor without numbers, or a number of images, of its own: nothing can read them but a rule."""
        value = torch.empty(1, dtype=torch.float64) if bound.value is None else bound.value
        made: Bounded = Tensor._make_wrapper_subclass(cls, value.shape[1:], dtype=value.dtype, device=value.device)
        made.bound, made.analysis, made.memory = bound, analysis, memory or Memory()
        made.version = made.memory.version
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Everything is done in ``__new__``."""

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        """Say what it is, not what it holds."""
        return f"Bounded(lipschitz={self.bound.lipschitz:g})"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do an operation by its rule, or refuse it."""
        kwargs = kwargs or {}
        first = next(bounded_in(args, kwargs), None)
        if first is None:
            raise UncertifiableError(unknown(full_name(func)))
        return first.analysis.call(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Refuse what came past the table: it would have no numbers to work on."""
        first = next(bounded_in(args, kwargs), None)
        error = unknown(str(func))
        raise first.analysis.refuse(error) if first is not None else UncertifiableError(error)


def bounded_in(*items: Any) -> Iterator[Bounded]:
    """Yield the values with a bound among arguments, however deep."""
    return (item for item in leaves(items) if isinstance(item, Bounded))


def _opened(item: Any) -> Any:
    return item.bound if isinstance(item, Bounded) else item


def _closed(result: Any, analysis: Analysis, memory: Memory | None) -> Any:
    if isinstance(result, Bound):
        return Bounded(result, analysis, memory)
    if isinstance(result, tuple) and any(isinstance(part, Bound) for part in result):
        parts = (_closed(part, analysis, memory) for part in result)
        return type(result)(*parts) if hasattr(result, "_fields") else tuple(parts)
    return result
