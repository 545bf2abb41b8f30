"""The register of checks: one small function each, open to users, and what they find."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

from espalier.doctor.patient import Patient, Record
from espalier.doctor.stats import TensorStats
from espalier.errors import EspalierError

AnyCheck = TypeVar("AnyCheck", bound=Callable[..., Iterator["Finding"]])
Scope = Literal["tensor", "model"]
Severity = Literal["error", "warning", "note"]
# Of one tensor: how severe it is, what is there, what is usual, and what to do; nothing where all is well.
Verdict = tuple[Severity, str, str, str] | None
Judge = Callable[[Record, TensorStats, Patient], Verdict]

# Most severe first; the order of a printed diagnosis.
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """What one check found in one layer.

    Attributes:
        severity: ``error`` (training cannot work as meant), ``warning`` (it probably does not) or ``note``.
        layer: name of the parameter, buffer or module; empty for the whole model.
        check: name of the check, which is also its heading in the guide.
        measured: what is there.
        usual: what a healthy start has.
        remedy: what to do, in one line.
        page: where it is explained, relative to the documentation.
    """

    severity: Severity
    layer: str
    check: str
    measured: str
    usual: str
    remedy: str
    page: str = ""


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
        EspalierError: the name is taken, or the scope is neither.
    """
    if scope not in ("tensor", "model"):
        raise EspalierError(f"scope {scope!r} of check {name!r}: choose 'tensor' or 'model'")
    if name in CHECKS and not replace:
        raise EspalierError(f"check {name!r} exists: choose another name, or pass replace=True")

    def register(function: AnyCheck) -> AnyCheck:
        CHECKS[name] = Check(name, scope, function, fresh_only)
        return function

    return register


def judges(name: str, *, scope: Scope = "model", fresh_only: bool = False) -> Callable[[Judge], Judge]:
    """Register a check that judges every tensor that holds numbers by itself (decorator).

    Args:
        name: what the findings call it.
        scope: ``"tensor"`` where it looks at ``record.values``, ``"model"`` where it compares with other tensors.
        fresh_only: drop its findings when the weights look trained.
    """

    def register(judge: Judge) -> Judge:
        def of_tensor(record: Record, patient: Patient) -> Iterator[Finding]:
            verdict = None if record.stats is None else judge(record, record.stats, patient)
            if verdict is not None:
                severity, measured, usual, remedy = verdict
                yield Finding(severity, record.name, name, measured, usual, remedy)

        def of_model(patient: Patient) -> Iterator[Finding]:
            for record in patient.records:
                yield from of_tensor(record, patient)

        register_check(name, scope=scope, fresh_only=fresh_only)(of_tensor if scope == "tensor" else of_model)
        return judge

    return register
