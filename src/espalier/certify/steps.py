"""What a network does in one pass on values with bounds, step by step, as plain passes are compared with it."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from espalier.certify.bounded import Bounded, bounded_in
from espalier.certify.counts import ImageCount
from espalier.certify.operations import Call, last_name
from espalier.certify.trail import Watch, digest_of

COUNT, VALUE, CONSTANT, SHOWN = "number of images", "value", "constant", "constant of every image"

KEEPS = {
    "contiguous", "clone", "detach", "alias", "positive", "requires_grad_", "view_as", "to", "type_as", "float",
    "double", "cpu", "cuda", "__pos__", "__get__", "as_tensor", "asarray",
}  # fmt: skip
"""Operations that return the value as it is where its shape and dtype stay."""

HOOKS = ("register_hook", "register_post_accumulate_grad_hook", "retain_grad")
"""Nothing happens to a value by them before gradients are taken."""

COUNTS = ("torch.numel", "torch.Tensor.numel", "torch.Tensor.__len__", "torch.Tensor.nbytes.__get__")
"""Questions that the number of images is a factor of the answer to."""


class Step(NamedTuple):
    """One operation, or one layer."""

    what: str
    """The name of an operation, or the path of a layer that is bounded by its own rule."""
    given: Any
    """Its arguments, as ``_described``."""
    made: tuple[int, ...]
    """The numbers of the values that it made or changed; −1 for a constant, −2 for what nothing may use (the indices of
    a sort)."""
    state: bytes = b""
    """Of a layer: what it is set to."""
    computed: tuple[Tensor, ...] = ()
    """Of a layer: what its parametrisations make."""


class Record(Watch):
    """Writes down the steps of a pass on values with bounds, which begins with ``first``.

    Values that do not come from the images, such as a constant that is shown for each, count as constants.
    """

    def __init__(self, first: Bounded) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self._values: dict[int, tuple[int, Bounded]] = {id(first): (0, first)}
        self._made = 1

    def steps_done(self) -> int:
        """Return how many steps were written down."""
        return len(self.steps)

    def go_back(self, done: int) -> None:
        """Forget the steps after so many."""
        del self.steps[done:]

    def operation(self, call: Call) -> Any:
        """Do an operation, and write it down unless it is a question about a value, or keeps it."""
        used = any(id(value) in self._values for value in bounded_in(call.args, call.kwargs))
        given = self._described(arguments_of(call)) if used else None  # before it can change that
        result = self.do(call)
        made = things_made(call, result)
        if used and any(isinstance(item, Tensor) for item in made):
            if not keeps(call, result):
                self.steps.append(Step(step_name(call), given, tuple(map(self._number, made))))
            elif id(call.args[0]) in self._values:
                self._values[id(result)] = self.number(call.args[0]), result
        return result

    def layer(self, path: str, module: nn.Module, given: Any, made: Any) -> None:
        """Write down a layer, unless it is shown constants alone."""
        if not self.depth and id(given) in self._values:
            self.steps.append(
                Step(path, self._described(given), (self._number(made),), digest_of(module), computed_in(module))
            )

    def number(self, value: Any) -> int:
        """Return the number of a value that was made, −1 if it was none."""
        return self._values.get(id(value), (-1, None))[0]

    def _number(self, item: Any) -> int:
        if not isinstance(item, Bounded):
            return -1 if isinstance(item, Tensor) else -2
        self._values[id(item)] = self._made, item  # changed in place, it is another value
        self._made += 1
        return self._made - 1

    def _described(self, item: Any) -> Any:
        if isinstance(item, Bounded):
            return self._described_value(item)
        if isinstance(item, ImageCount):
            return COUNT, None
        if isinstance(item, dict):
            return {name: self._described(part) for name, part in item.items()}
        parts = parts_of(item)
        return (CONSTANT, constant_of(item)) if parts is None else [self._described(part) for part in parts]

    def _described_value(self, value: Bounded) -> tuple[str, Any]:
        if id(value) in self._values:
            return VALUE, self.number(value)
        bound = value.bound
        if bound.lipschitz or bound.growth or bound.value is None:
            raise value.analysis.refuse("it uses a value that was made where nobody watched: in a thread of its own?")
        return SHOWN, constant_of(bound.value[0])


def computed_in(module: nn.Module) -> tuple[Tensor, ...]:
    """Return the tensors that a layer computes of its parameters: by rules that may ask how they are run."""
    parts = [part for part in module.modules() if is_parametrized(part)]
    return tuple(getattr(part, name).detach().clone() for part in parts for name in part.parametrizations)  # type: ignore[union-attr]


def things_made(call: Call, result: Any) -> list[Any]:
    """Return what an operation made or changed, each thing once."""
    made = [*(result if isinstance(result, list | tuple) else [result]), *(call.args[:1] if call.writes else ())]
    return list({id(item): item for item in made}.values())


def keeps(call: Call, result: Any) -> bool:
    """Return whether the result of an operation is its operand, or holds the same numbers."""
    operand = call.args[0] if call.args else None
    if not isinstance(operand, Tensor) or not isinstance(result, Tensor) or call.last not in KEEPS:
        return False
    if call.last == "__get__" and call.full != "torch.Tensor.data.__get__":
        return False
    if isinstance(operand, Bounded) and isinstance(result, Bounded):
        operand, result = operand.bound.value, result.bound.value
    if operand is None or result is None:
        return False
    return operand.shape == result.shape and operand.dtype == result.dtype and operand.device == result.device


def step_name(call: Call) -> str:
    """Return the name of an operation; what differs by where the result lies alone has one name.

    Whether a value was overwritten shows in what is done with it later.
    """
    return call.name.replace("reshape", "view") if last_name(call.name) == "reshape" else call.name


def arguments_of(call: Call) -> tuple[Any, dict[str, Any]]:
    """Return the arguments of an operation that say what it computes."""
    return call.args, {name: item for name, item in call.kwargs.items() if name != "inplace"}


def parts_of(item: Any) -> list[Any] | None:
    """Return what an argument consists of, or None if it is one thing."""
    if isinstance(item, slice):
        return ["slice", item.start, item.stop, item.step]
    return list(item) if isinstance(item, list | tuple) else None


def constant_of(item: Any) -> Any:
    """Return a constant as it is now: a copy of a tensor, a digest of anything else."""
    return item.detach().clone() if isinstance(item, Tensor) else digest_of(item)
