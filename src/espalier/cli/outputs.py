"""What a command writes must not take the place of what it reads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from espalier.errors import EspalierError

# Lists of paths are read, too. Every other path is written: a new output is guarded under any name.
_READ = ("against", "checkpoint", "data", "like", "model", "models", "run")
_RENEWED = (".html", ".jsonl")
"""Endings of pages, which are made again, and of files of records, which are added to."""


def spare_inputs(arguments: Mapping[str, Any]) -> None:
    """Refuse to write over an input, or into a run folder that is read: its files are all that is left of the run.

    In another folder that is read, such as a study, new files and pages have a place.

    Args:
        arguments: of a command, by name.

    Raises:
        EspalierError: an output that is an input, or lies where it would damage one.
    """
    several = {name: value if isinstance(value, list | tuple) else [value] for name, value in arguments.items()}
    named = [each for name in _READ for each in several.get(name, ()) if isinstance(each, str | Path)]
    listed = [each for name, value in several.items() if value is arguments[name] for each in value]
    read = [Path(os.path.realpath(each)) for each in (*named, *(each for each in listed if isinstance(each, Path)))]
    for name, out in arguments.items():
        if name in _READ or not isinstance(out, Path):
            continue
        target = Path(os.path.realpath(out))
        for place in read:
            if target == place and target.suffix != ".jsonl":
                raise EspalierError(f"{name} {out} is read here, too: name another file to write")
            if place in target.parents and (
                _in_run(target, place) or (target.exists() and target.suffix not in _RENEWED)
            ):
                raise EspalierError(f"{name} {out} lies in {place}, which is read here: name a file outside of it")


def _in_run(target: Path, top: Path) -> bool:
    from espalier.train.run import RECIPE

    inside = [folder for folder in target.parents if folder == top or top in folder.parents]
    return any((folder / RECIPE).is_file() for folder in inside)
