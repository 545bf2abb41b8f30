"""What is proved about one tensor of a forward pass, and what an operand adds to a result; see ``certify.bounded``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor, nn

from espalier.certify.arithmetic import add_up, image_norms
from espalier.certify.refusal import UncertifiableError

NEEDS_EXAMPLE = "what it does depends on the size of its input: give an example= of the images"


@dataclass(frozen=True, eq=False)
class Bound:
    """What is proved about one tensor of a forward pass; see ``espalier.certify.bounded``."""

    value: Tensor | None
    """ĥ(x), (N, …) as computed; None where no image size is given."""
    lipschitz: float
    """L."""
    error: Tensor | None = None
    """a, (N,) in float64."""
    growth: float = 0.0
    """b."""
    rows: Rows | None = None
    """Of a value that is a linear map of another one: that map, for bounds on differences of its components."""

    @cached_property
    def size(self) -> tuple[Tensor, float]:
        """Return s (N,) and t with ‖ĥ(x′)‖ ≤ s + t·r."""
        assert self.value is not None
        assert self.error is not None
        return image_norms(self.value) + 2 * self.error, add_up(self.lipschitz, self.growth)

    @property
    def numbers(self) -> Tensor:
        """Return the value; where there is none, the operation that asks needs to know the image size."""
        if self.value is None:
            raise UncertifiableError(NEEDS_EXAMPLE)
        return self.value

    @property
    def is_constant(self) -> bool:
        """Return whether it depends on no image."""
        return self.lipschitz == self.growth == 0

    def apply(self, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor | None:
        """Return what a function makes of the value, if there is one."""
        return None if self.value is None else function(self.value, *args, **kwargs)


class Rows(NamedTuple):
    """A value (N, C) = h·Wᵀ + b."""

    source: Bound
    """h."""
    weight: Tensor
    """W (C, F)."""
    bias: Tensor | None


class Term(NamedTuple):
    """What one operand adds to the bound of a result."""

    operand: Bound
    factor: float
    """Lipschitz constant of the result in this operand."""
    rounding: float = 0.0
    """Rounding error of the operation, per unit of the operand's norm."""
    peak: float = 0.0
    """Largest number that is met on the way, per unit of the operand's norm, if that is more than ``factor``."""


class Memory:
    """Tensors that may share their numbers: a change of one in place is a change of all."""

    __slots__ = ("constant", "version")

    def __init__(self, *, constant: bool = False) -> None:
        self.version = 0
        self.constant = constant
        """Whether they may be the network's own, shown once for every image."""


@dataclass(eq=False)
class Run:
    """One call of a module, on one value."""

    given: Bound
    begun: int
    """How many values there were before."""
    alone: bool = True
    """Whether nothing was read but that value, constants, and what was made of these."""
    constants: dict[nn.Module, float] = field(default_factory=dict)
    """Of the modules that were called inside: the largest that came of it, ∞ where it was not of one value alone."""
