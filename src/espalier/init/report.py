"""The report of ``structure_`` and ``audit``: one row a layer, what was asked and what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from espalier.tables import plain_table

Status = Literal["written", "present", "changed", "absent", "lost", "failed", "skipped"]


@dataclass(frozen=True)
class LayerReport:
    """One layer: where it is, what was asked of it, what its weights show now.

    ``status`` is ``written`` (by this call, and verified), ``present`` or ``absent`` (an audit), ``lost`` (it was there
    in the report that the audit was held against), ``changed`` (it still is, in other bits than those of ``mark``, the
    fingerprint that ``structure_(guard=True)`` takes), ``failed`` (its weights cannot work, or writing or
    measuring them failed; the note says why) or ``skipped`` (left alone; the note says why).
    """

    layer: str
    kind: str
    host: str
    status: Status
    asked: str = ""
    measured: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    mark: str = ""


@dataclass(frozen=True)
class StructureReport:
    """Every layer that a layout recognised, in module order; prints as a table.

    Attributes:
        layers: one row a layer.
        notes: what is to be known of the whole model.
    """

    layers: tuple[LayerReport, ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether no layer lost its structure or failed."""
        return all(row.status not in ("lost", "failed") for row in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists and dictionaries for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StructureReport:
        """Return the report that ``to_dict`` gave.

        Raises:
            AttributeError, KeyError, OverflowError, TypeError, ValueError: it has other fields, or values of another
                kind.
        """
        rows = []
        for row in data["layers"]:
            # Strict JSON has no NaN: what could not be measured is null there.
            measured = {name: math.nan if value is None else value for name, value in row["measured"].items()}
            rows.append(LayerReport(**{**row, "measured": measured}))
        whole = cls(tuple(rows), tuple(data.get("notes", ())))
        _ = str(whole)  # a list where a text or a number should be shows here
        return whole

    def __str__(self) -> str:
        header = ("layer", "kind", "host", "status", "asked", "measured")
        rows = [header] + [
            (row.layer or "(model)", row.kind, row.host, row.status, row.asked, describe_measured(row))
            for row in self.layers
        ]
        return "\n".join([plain_table(rows), *(f"note: {note}" for note in self.notes)])


def describe_measured(row: LayerReport) -> str:
    """Return what was measured of a layer, and the note on it; standard scores are left out."""
    shown = ", ".join(f"{name} {value:+.3g}" for name, value in row.measured.items() if not name.endswith("_z"))
    return "; ".join(part for part in (shown, row.note) if part)
