"""The result of ``diagnose``: every finding, most severe first, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from espalier.doctor.patient import pattern_of
from espalier.doctor.registry import SEVERITIES, Finding
from espalier.tables import table_lines


@dataclass(frozen=True)
class Diagnosis:
    """What the checks found; prints as a table, or as one line when nothing is wrong.

    Attributes:
        findings: most severe first, then in the order of the model's layers.
        tensors: how many parameters and buffers were read.
        parameters: how many numbers they hold.
        trained: whether the weights look trained, so that checks of a fresh start were left out.
    """

    findings: tuple[Finding, ...]
    tensors: int = 0
    parameters: int = 0
    trained: bool = False

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that stop a run from working as meant."""
        return tuple(finding for finding in self.findings if finding.severity == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """The findings that probably do."""
        return tuple(finding for finding in self.findings if finding.severity == "warning")

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return not self.errors

    def exit_status(self, strict: bool = False) -> int:
        """Return 1 if there is an error (``strict``: or a warning), else 0: what a shell or CI can gate on."""
        return int(bool(self.errors or (strict and self.warnings)))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return {**asdict(self), "findings": [asdict(finding) for finding in self.findings]}

    def to_json(self) -> str:
        """Return the diagnosis as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        state = "trained weights" if self.trained else "a fresh start"
        read = f"{self.tensors} tensors, {self.parameters:,} numbers, {state}"
        if not self.findings:
            return f"healthy: {read}; nothing found"
        counts = [f"{n} {s}{'s' * (n != 1)}" for s in SEVERITIES if (n := sum(f.severity == s for f in self.findings))]
        return "\n".join([f"{', '.join(counts)} ({read})", *_table(_merged(self.findings))])


def _merged(findings: Sequence[Finding]) -> list[Finding]:
    """Show findings that differ only in the numbers of their layer as one row, with a star for the numbers."""
    groups: dict[tuple[str, ...], list[Finding]] = {}
    for finding in findings:
        pattern = pattern_of(finding.layer)
        groups.setdefault((finding.severity, finding.check, pattern, finding.usual, finding.remedy), []).append(finding)
    rows = []
    for (_, _, pattern, _, _), members in groups.items():
        first = members[0]
        if len(members) > 1:
            first = replace(first, layer=f"{pattern} ({len(members)}×)", measured=f"{first.measured}, …")
        rows.append(first)
    return rows


def _table(rows: Sequence[Finding]) -> list[str]:
    header = ("severity", "layer", "check", "measured", "usual")
    cells = [header, *((f.severity, f.layer or "(model)", f.check, f.measured, f.usual) for f in rows)]
    heading, rule, *lines = table_lines(cells)
    table, margin = [heading, rule], " " * len(rule.partition(" ")[0])
    for line, finding in zip(lines, rows, strict=True):
        table += [line, f"{margin}  → {finding.remedy}" + (f" ({finding.page})" if finding.page else "")]
    return table
