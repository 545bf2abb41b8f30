"""Where results go: tables as JSON lines and as Markdown, records of trainings, curves."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from espalier.study import add_records, record_run
from espalier.train import Run, environment


class Results:
    """The files of one output folder; a second program that names the same folder adds to them."""

    def __init__(self, out: Path, commit: str | None) -> None:
        self.out, self.commit = out, commit

    def add(self, table: str, **row: Any) -> None:
        """Append a row to a table, on disk at once."""
        self._append("tables.jsonl", {"table": table, **{key: _rounded(value) for key, value in row.items()}})
        print(f"{table}: " + ", ".join(f"{key} {_rounded(value)}" for key, value in row.items()), flush=True)

    def add_timing(self, table: str, timing: Any, base_ms: float | None, **row: Any) -> None:
        """Append a row with the numbers of a ``Timing`` and how many times faster it is than ``base_ms``."""
        faster = None if base_ms is None else base_ms / timing.median_ms
        self.add(table, **row, **timing._asdict(), faster=faster)

    def add_run(self, study: str, arm: str, run: Run, **more: Any) -> None:
        """Add a finished run as a record with the extra figures ``more``, as a row of its table, and its curve."""
        extra = {key: float(value) for key, value in more.items() if isinstance(value, int | float)}
        record = record_run(run, study, arm, extra)
        record = replace(record, commit=self.commit or record.commit)
        add_records([record], self.out / "records.jsonl")
        self._append("curves.jsonl", {"study": study, "arm": arm, "seed": run.recipe.seed, "rows": run.rows})
        shown = {key: getattr(record, key) for key in ("study", "arm", "seed", "score", "diverged", "step_seconds")}
        self.add("trainings", **shown, **more)

    def write(self) -> None:
        """Write ``results.md`` from ``tables.jsonl``."""
        lines = (self.out / "tables.jsonl").read_text().splitlines()
        tables: dict[str, list[dict[str, Any]]] = {}
        for row in map(json.loads, lines):
            tables.setdefault(row.pop("table"), []).append(row)
        where = environment()
        text = [f"# On {where['gpu'] or 'a CPU'}", "", f"torch {torch.__version__}, commit {self.commit}."]
        for name, rows in tables.items():
            columns = list(dict.fromkeys(key for row in rows for key in row))
            text += ["", f"## {name}", "", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
            text += ["| " + " | ".join(_cell(row.get(key)) for key in columns) + " |" for row in rows]
        (self.out / "results.md").write_text("\n".join(text) + "\n")

    def _append(self, name: str, value: dict[str, Any]) -> None:
        with (self.out / name).open("a") as file:
            file.write(json.dumps(value) + "\n")


def _rounded(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " · ")
