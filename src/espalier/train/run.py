"""A run folder: how it comes to be, and how it is read back."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from espalier import data
from espalier.data.source import Source
from espalier.errors import EspalierError
from espalier.files import load_weights, write_bytes, write_json, write_tensors
from espalier.recipes.base import Recipe
from espalier.recipes.validation import first_difference, load_recipe, recipe_to_dict
from espalier.train.build import build_bare_model, environment
from espalier.train.image_input import ImageInput

if TYPE_CHECKING:
    from espalier.init import StructureReport

RECIPE, ENVIRONMENT, MODEL, STRUCTURE = "recipe.json", "environment.json", "model.json", "structure.json"
METRICS, RESULT = "metrics.jsonl", "result.json"
START, FINAL = "start.safetensors", "final.safetensors"


class RunInterrupted(KeyboardInterrupt):
    """A run was stopped from the keyboard; its message says how to go on. No ``except Exception`` swallows it."""


@dataclass(frozen=True)
class Run:
    """A run folder, read back.

    ``rows`` are the lines of metrics.jsonl; ``result`` is None while the run is unfinished. A run whose loss or
    weights stopped being finite is finished: ``result["diverged"]`` is true, ``result["score"]`` is None, and
    there are no final weights.
    """

    path: Path
    recipe: Recipe
    rows: list[dict[str, Any]] = field(repr=False)
    result: dict[str, Any] | None

    def model(self, which: Literal["final", "start"] = "final") -> nn.Module:
        """Return the run's model with its weights after training or after initialisation, in evaluation mode.

        Raises:
            EspalierError: the run has no such weights (unfinished, diverged).
        """
        if which not in ("final", "start"):
            raise EspalierError(f"weights {which!r} of a run: choose 'final' or 'start'")
        weights = self.path / (FINAL if which == "final" else START)
        if not weights.exists():
            state = "diverged" if self.result else "is not finished"
            raise EspalierError(f"run {self.path} {state}: it has no {weights.name}")
        model = build_bare_model(self.recipe, json.loads((self.path / MODEL).read_text())["args"])
        load_weights(model, weights)
        return model.eval()

    def source(self) -> Source:
        """Return the run's data."""
        return data.build_source(self.recipe)


def load_run(path: Path | str) -> Run:
    """Read a run folder.

    Raises:
        EspalierError: ``path`` is not a run folder.
    """
    path = Path(path)
    if not (path / RECIPE).is_file():
        raise EspalierError(f"{path} is not a run folder: it has no {RECIPE}")
    result = json.loads((path / RESULT).read_text()) if (path / RESULT).exists() else None
    return Run(path, load_recipe(path / RECIPE), read_rows(path), result)


def check_folder(out: Path, recipe: Recipe, resume: str) -> Literal["new", "unfinished", "finished"]:
    """Say what the run of ``recipe`` in ``out`` would start from, touching nothing.

    Raises:
        EspalierError: the folder belongs to something else, or holds an unfinished run and ``resume`` is "never".
    """
    if resume not in ("auto", "never"):
        raise EspalierError(f"resume {resume!r}: choose 'auto' or 'never'")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return "new"
    if not (out / RECIPE).is_file():
        raise EspalierError(f"{out} exists and is not a run folder: choose another folder")
    existing = load_recipe(out / RECIPE)
    name = first_difference(existing, recipe)
    if name is not None:
        raise EspalierError(
            f"{out} holds a run of another recipe: {name} is {getattr(existing, name)!r} there and "
            f"{getattr(recipe, name)!r} here; choose another folder"
        )
    if (out / RESULT).exists():
        return "finished"
    if resume == "never":
        raise EspalierError(f"{out} holds an unfinished run: resume='auto' goes on with it, or choose another folder")
    return "unfinished"


def create_folder(
    out: Path,
    recipe: Recipe,
    source: Source,
    model: nn.Module,
    model_args: dict[str, Any],
    report: StructureReport | None,
) -> None:
    """Make the run folder with everything that is known before training; it appears whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.new")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        write_json(partial / RECIPE, recipe_to_dict(recipe))
        write_json(partial / ENVIRONMENT, environment())
        write_json(partial / MODEL, finite({"name": recipe.model, "args": model_args}))
        if (images := ImageInput.of(source)) is not None:
            images.save(partial)
        if report is not None:
            write_json(partial / STRUCTURE, finite(dataclasses.asdict(report)))
        write_tensors(partial / START, model.state_dict())
        write_bytes(partial / METRICS, b"")
        os.replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl; a last line that a kill cut short is no row."""
    metrics = path / METRICS
    if not metrics.exists():
        return []
    return [json.loads(line) for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]


def cut_rows(path: Path, count: int) -> None:
    """Keep the first ``count`` rows of metrics.jsonl: those that the checkpoint knows of."""
    write_bytes(path / METRICS, "".join(_line(row) for row in read_rows(path)[:count]).encode())


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add one row to metrics.jsonl."""
    with (path / METRICS).open("a") as file:
        file.write(_line(row))


def finite(value: Any) -> Any:
    """Return ``value`` as JSON takes it: NaN and infinities become None, tuples lists, other objects their text."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [finite(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int | bool) else str(value)


def _line(row: dict[str, Any]) -> str:
    return json.dumps(finite(row), allow_nan=False) + "\n"
