"""What the doctor says of a run's weights before its first step."""

from __future__ import annotations

from espalier.doctor import diagnose
from espalier.report.section import Context, Section, folded, paragraph, table
from espalier.train import Run
from espalier.train.run import START


def health(run: Run, context: Context) -> Section | None:
    """List what was wrong with the weights that the run started from, the worst first."""
    if not (run.path / START).exists():
        return None
    diagnosis = diagnose(run.model("start"))
    rows = [(f.severity, f.layer or "(model)", f.check, f.measured, f.usual, f.remedy) for f in diagnosis.findings]
    if not rows:
        return Section("Health at the start", (paragraph(str(diagnosis)),))
    header = ("severity", "layer", "check", "measured", "usual", "remedy")
    listed = table(header, rows) if diagnosis.errors or diagnosis.warnings else folded("Notes", table(header, rows))
    return Section("Health at the start", (paragraph(str(diagnosis).splitlines()[0]), listed))
