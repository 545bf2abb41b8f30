"""Where results go: tables as JSON lines and as Markdown, records of trainings, curves."""

from __future__ import annotations

import hashlib
import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from espalier.recipes import Recipe
from espalier.recipes.validation import recipe_to_dict
from espalier.train import Run, environment

# Fields of a recipe that say where and how it runs, not what is learnt.
_MACHINE_BOUND = ("data_path", "threads", "checkpoint_every")


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
        """Append a finished run as a record and as a row of its table, and its curve."""
        record = trial_record(study, arm, run, commit=self.commit, **more)
        self._append("records.jsonl", record)
        self._append("curves.jsonl", {"study": study, "arm": arm, "seed": run.recipe.seed, "rows": run.rows})
        shown = ("study", "arm", "seed", "score", "diverged", "seconds_per_step", *more)
        self.add("trainings", **{key: record[key] for key in shown})

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


def trial_record(study: str, arm: str, run: Run, **more: Any) -> dict[str, Any]:
    """Return what a finished training leaves behind: one line, enough to rebuild a table."""
    result, split = run.result or {}, (run.result or {})["metric"]
    recipe, where = run.recipe, environment()
    return {
        "study": study,
        "recipe_digest": digest(recipe),
        "arm": arm,
        "lr": recipe.lr,
        "seed": recipe.seed,
        "score": _rounded(result["score"]),
        "metric": split,
        "curve": [[row["epoch"], _rounded(row[split])] for row in _thinned(run.rows)],
        "epochs": result["epochs"],
        "steps": result["steps"],
        "seconds_per_step": _rounded(result["step_seconds"]),
        "diverged": result["diverged"],
        "versions": {name: where["packages"].get(name) for name in ("espalier", "torch", "kornia")},
        "processor": where["gpu"] or "CPU",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        **more,
    }


def digest(recipe: Recipe) -> str:
    """Return the digest of a recipe without the fields that are bound to a machine."""
    values = {key: value for key, value in recipe_to_dict(recipe).items() if key not in _MACHINE_BOUND}
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=8).hexdigest()


def _thinned(rows: list[dict[str, Any]], most: int = 26) -> list[dict[str, Any]]:
    step = math.ceil(len(rows) / most)
    return rows[:: -step or -1][::-1]


def _rounded(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " · ")
