"""One look at a model during a run: the stage, what the doctor found, what the audit measured."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from espalier.doctor import Diagnosis
from espalier.errors import EspalierError
from espalier.init import LayerReport, StructureReport

Stage = Literal["start", "checkpoint loaded", "end"]


@dataclass(frozen=True)
class WatchCheck:
    """What a ``StructureWatch`` saw at one stage; prints as one line when nothing is wrong.

    Attributes:
        stage: ``start``, ``checkpoint loaded`` or ``end``.
        diagnosis: of the doctor.
        structure: of the audit; ``None`` for a model without a layer that any layout recognises.
    """

    stage: Stage
    diagnosis: Diagnosis
    structure: StructureReport | None

    @property
    def problems(self) -> tuple[str, ...]:
        """One line a problem: the doctor's errors, layers that failed, and layers that lost their structure.

        At the end a lost structure is no problem: training may move weights wherever the loss is lower.
        """
        lines = [f"{f.layer or 'model'}: {f.check}: {f.measured}; {f.remedy}" for f in self.diagnosis.errors]
        for row in self._rows("failed") if self.stage == "end" else self._rows("lost", "failed"):
            lines.append(f"{row.layer or 'model'}: structure {row.status}: {row.note or 'it no longer stands out'}")
        return tuple(lines)

    @property
    def clean(self) -> bool:
        """Whether there is nothing to tell: no finding of any severity, no layer lost or failed."""
        return not self.diagnosis.findings and (self.structure is None or self.structure.ok)

    def __str__(self) -> str:
        counts = Counter(row.status for row in self.structure.layers) if self.structure else {}
        words = ", ".join(f"{count} {status}" for status, count in counts.items()) or "no layer recognised"
        first, *table = str(self.diagnosis).splitlines()
        rows = [f"structure {r.status}: {r.layer or '(model)'}  {r.note}" for r in self._rows("lost", "failed")]
        return "\n".join([f"espalier, {self.stage}: {first}; structure: {words}", *table, *rows])

    def _rows(self, *statuses: str) -> list[LayerReport]:
        return [row for row in self.structure.layers if row.status in statuses] if self.structure else []


class UnhealthyModelError(EspalierError):
    """A model that cannot train as meant, or a checkpoint whose structure did not arrive; ``problems`` lists all."""

    def __init__(self, stage: Stage, problems: tuple[str, ...]) -> None:
        more = f" (and {len(problems) - 1} more: see the table above)" if len(problems) > 1 else ""
        super().__init__(f"{stage}: {problems[0]}{more}; on_problem='warn' goes on")
        self.stage = stage
        self.problems = problems
