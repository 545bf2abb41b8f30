"""The register of checks: one small function each, open to users."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

from espalier.doctor.finding import Finding
from espalier.errors import EspalierError

if TYPE_CHECKING:
    from espalier.doctor.patient import Patient
    from espalier.doctor.record import Record

TensorCheck = Callable[["Record", "Patient"], Iterator[Finding]]
ModelCheck = Callable[["Patient"], Iterator[Finding]]
AnyCheck = TypeVar("AnyCheck", bound=Callable[..., Iterator[Finding]])
Scope = Literal["tensor", "model"]


@dataclass(frozen=True)
class Check:
    """A registered check: its name, what it looks at, and whether trained weights are none of its business."""

    name: str
    scope: Scope
    function: Callable[..., Iterator[Finding]]
    fresh_only: bool = False


CHECKS: dict[str, Check] = {}


def register_check(
    name: str, *, scope: Scope = "model", fresh_only: bool = False, replace: bool = False
) -> Callable[[AnyCheck], AnyCheck]:
    """Add a check to every later diagnosis (decorator).

    A check is a generator of ``Finding``. With ``scope="tensor"`` it is called as ``check(record, patient)`` for every
    tensor with storage, while ``record.values`` holds the tensor; with ``scope="model"`` as ``check(patient)`` once,
    after every tensor was read, with ``patient.records`` (numbers, no tensors).

    Args:
        name: what the findings call it.
        scope: what it looks at.
        fresh_only: drop its findings when the weights look trained.
        replace: take the place of the check of this name.

    Raises:
        EspalierError: the name is taken.
    """
    if name in CHECKS and not replace:
        raise EspalierError(f"check {name!r} exists: choose another name, or pass replace=True")

    def register(function: AnyCheck) -> AnyCheck:
        CHECKS[name] = Check(name, scope, function, fresh_only)
        return function

    return register
