"""A run folder: how it comes to be, and how it is read back; every file is held to its digest in the manifest."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from espalier import data
from espalier.data.source import Source, data_digest
from espalier.errors import EspalierError, require_known, told
from espalier.files import load_weights, read_object, read_regular, write_bytes, write_json, write_tensors
from espalier.recipes.base import Recipe
from espalier.recipes.validation import check_sizes, first_difference, load_recipe, recipe_to_dict
from espalier.train.build import build_bare_model, environment, resolved_model_args
from espalier.train.image_input import IMAGES, ImageInput
from espalier.train.manifest import MANIFEST, damaged, digest, file_digest, read_manifest, write_manifest

if TYPE_CHECKING:
    from espalier.init import StructureReport

RECIPE, ENVIRONMENT, MODEL, STRUCTURE = "recipe.json", "environment.json", "model.json", "structure.json"
METRICS, RESULT = "metrics.jsonl", "result.json"
CONTENTS = "contents"
"""The note of a run's manifest that says what data it has, wherever they lie."""
START, FINAL = "start.safetensors", "final.safetensors"
_LOOKS = 5


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
            EspalierError: the run has no such weights (unfinished, diverged), or they are damaged.
        """
        require_known("weights of a run", which, ("final", "start"))
        weights = self.path / (FINAL if which == "final" else START)
        if not weights.exists():
            state = "is not finished" if self.result is None else "has lost a file"
            if which == "final" and self.result and self.result.get("diverged"):
                state = "diverged"
            raise EspalierError(f"run {self.path} {state}: it has no {weights.name}")
        refuse_damage(self.path, [weights.name])
        arguments = read_part(self.path, MODEL).get("args")
        if not isinstance(arguments, dict):
            raise EspalierError(f"{self.path / MODEL} is damaged (no arguments of a model): train into another folder")
        check_sizes(self.recipe.model, arguments)
        model = build_bare_model(self.recipe, arguments)
        load_weights(model, weights)
        return model.eval()

    def source(self) -> Source:
        """Return the run's data.

        Raises:
            EspalierError: they cannot be read, or are not what they were when the run was started.
        """
        source = data.build_source(self.recipe)
        check_data(self.path, source)
        return source


def load_run(path: Path | str) -> Run:
    """Read a run folder.

    Raises:
        EspalierError: ``path`` is not a run folder, or one of its files is damaged (weights are checked when they are
            loaded).
    """
    path = Path(path)
    if not (path / RECIPE).is_file():
        raise EspalierError(f"{path} is not a run folder: it has no {RECIPE}")
    refuse_damage(path, {RECIPE, *lasting_files(path)} - {START})
    for _ in range(_LOOKS):
        lines = _whole_lines(path)
        if digest(lines) in read_manifest(path)[0].get(METRICS, ()):
            break  # else a process that trains here may have written a row in between
    else:
        raise EspalierError(f"{path / METRICS} is damaged: train again to restore its rows, or restore it from a copy")
    result = None
    if (path / RESULT).exists():
        refuse_damage(path, [RESULT])
        result = read_part(path, RESULT)
        figures = {name: value for name, value in result.items() if name not in ("metric", "diverged", "diverged_at")}
        kinds = isinstance(result.get("metric"), str), result.get("diverged") is (result.get("score") is None)
        if not (all(kinds) and _are_figures(figures, "epochs", "steps", "seconds")):
            raise EspalierError(f"{path / RESULT} is damaged (no result of a run): train into another folder")
    return Run(path, load_recipe(path / RECIPE), parse_rows(lines, path / METRICS), result)


def read_part(path: Path, name: str) -> dict[str, Any]:
    """Return the object that a file of a run folder holds.

    Raises:
        EspalierError: it cannot be read, or holds something else.
    """
    try:
        return read_object(path / name)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        raise EspalierError(
            f"{path / name} is damaged ({reason}): restore it from a copy, or train into another folder"
        ) from None


def read_structure(path: Path) -> StructureReport | None:
    """Return what was written into the network of a run folder before training, None where nothing was.

    Raises:
        EspalierError: the file that says so is damaged.
    """
    from espalier.init import StructureReport

    if not (path / STRUCTURE).exists():
        return None
    content = read_part(path, STRUCTURE)
    try:
        return StructureReport.from_dict(content)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise EspalierError(f"{path / STRUCTURE} is damaged ({told(error)}): train into another folder") from None


def check_folder(out: Path, recipe: Recipe, resume: str) -> Literal["new", "unfinished", "finished"]:
    """Say what the run of ``recipe`` in ``out`` would start from, touching nothing.

    Raises:
        EspalierError: the folder belongs to something else, or holds an unfinished run and ``resume`` is "never".
    """
    require_known("resume", resume, ("auto", "never"))
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return "new"
    if not (out / RECIPE).is_file():
        raise EspalierError(f"{out} exists and is not a run folder: choose another folder")
    refuse_damage(out, [RECIPE])
    existing = load_recipe(out / RECIPE)
    name = first_difference(existing, recipe)
    if existing.data_path != recipe.data_path and read_manifest(out)[1].get("data") is None:
        name = "data_path"  # the data do not say what they hold, so the path alone tells which they are
    if name is not None:
        raise EspalierError(
            f"{out} holds a run of another recipe: {name} is {getattr(existing, name)!r} there and "
            f"{getattr(recipe, name)!r} here; choose another folder"
        )
    if (out / RESULT).exists():
        refuse_damage(out, [RESULT])
        return "finished"
    if resume == "never":
        raise EspalierError(f"{out} holds an unfinished run: resume='auto' goes on with it, or choose another folder")
    return "unfinished"


def check_data(path: Path, source: Source) -> None:
    """Refuse data that are not what they were when the run was started, as far as the source can tell.

    Raises:
        EspalierError: files are gone, images or classes have changed.
    """
    _, notes = read_manifest(path)
    if notes.get("data") != getattr(source, "digest", None):
        raise EspalierError(f"the data of {path} have changed since it was started: restore them, or start another run")


def create_folder(out: Path, recipe: Recipe, source: Source, model: nn.Module, report: StructureReport | None) -> None:
    """Make the run folder with everything that is known before training; it appears whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.new")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        write_json(partial / RECIPE, recipe_to_dict(recipe))
        write_json(partial / ENVIRONMENT, environment())
        write_json(partial / MODEL, finite({"name": recipe.model, "args": resolved_model_args(recipe, source)}))
        if (images := ImageInput.of(source)) is not None:
            write_json(partial / IMAGES, dataclasses.asdict(images))
        if report is not None:
            write_json(partial / STRUCTURE, finite(dataclasses.asdict(report)))
        write_tensors(partial / START, model.state_dict())
        write_bytes(partial / METRICS, b"")
        seal(partial, {"data": getattr(source, "digest", None), CONTENTS: data_digest(source)})
        os.replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def seal(path: Path, notes: Mapping[str, Any] | None = None) -> None:
    """Write the manifest of a run folder over the files that are there now."""
    files = {file.name: [file_digest(file)] for file in path.iterdir() if file.is_file() and file.name != MANIFEST}
    write_manifest(path, files, notes)


def parse_rows(lines: bytes, path: Path) -> list[dict[str, Any]]:
    """Return the rows that whole lines of metrics.jsonl hold.

    Args:
        lines: the lines.
        path: their file, for messages.

    Raises:
        EspalierError: a line is no row.
    """
    try:
        rows = [json.loads(line) for line in lines.splitlines()]
        if not all(isinstance(row, dict) and _are_figures(row, "epoch", "step", "seconds") for row in rows):
            raise ValueError("a row without its figures")
        return rows
    except (ValueError, RecursionError) as error:
        raise EspalierError(f"{path} is damaged ({error}): restore it from a copy") from None


def is_number(value: Any) -> bool:
    """Return whether a value from a file is a finite number, and not so long that no float holds it."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _are_figures(values: Mapping[str, Any], *needed: str) -> bool:
    """Return whether these are numbers by name, the needed ones from 0; others may be missing."""
    if not all(is_number(values.get(name)) and values[name] >= 0 for name in needed):
        return False
    return all(value is None or is_number(value) for value in values.values())


def write_recipe(path: Path, recipe: Recipe) -> None:
    """Make ``recipe`` that of a run which goes on: its data may lie elsewhere now (Note [Manifest first])."""
    if load_recipe(path / RECIPE) == recipe:
        return
    content = (json.dumps(recipe_to_dict(recipe), indent=2, allow_nan=False) + "\n").encode()
    files, notes = read_manifest(path)
    write_manifest(path, {**files, RECIPE: [file_digest(path / RECIPE), digest(content)]}, notes)
    write_bytes(path / RECIPE, content)


def write_rows(path: Path, rows: Sequence[dict[str, Any]], keep: int = 0) -> None:
    """Make ``rows`` the content of metrics.jsonl; where it holds the first ``keep`` of them, the others are appended.

    The manifest knows both contents before the file changes (Note [Manifest first]).
    """
    lines = [(json.dumps(row, allow_nan=False) + "\n").encode() for row in rows]
    files, notes = read_manifest(path)
    whole = b"".join(lines)
    before = digest(b"".join(lines[:keep])) if keep else digest(_whole_lines(path))
    known = [before] if before in files.get(METRICS, ()) else []
    write_manifest(path, {**files, METRICS: [*known, digest(whole)]}, notes)
    if keep:
        with (path / METRICS).open("ab") as file:
            file.write(b"".join(lines[keep:]))
    else:
        write_bytes(path / METRICS, whole)


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write result.json, which makes the run a finished one; the manifest knows it and the final weights first."""
    content = (json.dumps(result, indent=2, allow_nan=False) + "\n").encode()
    files, notes = read_manifest(path)
    found = {name: [file_digest(path / name)] for name in (METRICS, FINAL) if (path / name).exists()}
    write_manifest(path, {**files, **found, RESULT: [digest(content)]}, notes)
    write_bytes(path / RESULT, content)


def lasting_files(path: Path) -> set[str]:
    """Return the files of a run folder that are written once, before the first step.

    Raises:
        EspalierError: the manifest is missing or damaged.
    """
    return read_manifest(path)[0].keys() - {FINAL, METRICS, RESULT}


def refuse_damage(path: Path, names: Collection[str]) -> None:
    """Refuse files of a run folder whose content is not what the manifest says.

    Raises:
        EspalierError: one of them is damaged or missing; the message names it.
    """
    if (name := damaged(path, sorted(names))) is not None:
        raise EspalierError(f"{path / name} is damaged: restore it from a copy, or train into another folder")


def _whole_lines(path: Path) -> bytes:
    """Return metrics.jsonl up to its last end of line; a line that a kill cut short is no row."""
    file = path / METRICS
    content = read_regular(file) if file.is_file() else b""  # gone, or a pipe or a device took its place
    return content[: content.rfind(b"\n") + 1]


def finite(value: Any) -> Any:
    """Return ``value`` as JSON takes it: NaN and infinities become None, tuples lists, other objects their text."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [finite(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int | bool) else str(value)
