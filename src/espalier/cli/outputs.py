"""What a command writes must not take the place of what it reads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from espalier.errors import EspalierError

_WRITTEN = ("out", "picture")
_READ = ("against", "checkpoint", "data", "folders", "like", "model", "models", "run")


def spare_inputs(arguments: Mapping[str, Any]) -> None:
    """Refuse to write over an input, or into a run folder that is read: its files are all that is left of the run.

    In another folder that is read, such as a study, new files and pages have a place.

    Args:
        arguments: of a command, by name.

    Raises:
        EspalierError: an output that is an input, or lies where it would damage one.
    """
    values = [arguments.get(name) for name in _READ]
    several = [value if isinstance(value, list | tuple) else [value] for value in values]
    read = [Path(os.path.realpath(each)) for value in several for each in value if isinstance(each, str | Path)]
    for name, out in [(name, arguments.get(name)) for name in _WRITTEN]:
        if not isinstance(out, Path):
            continue
        target = Path(os.path.realpath(out))
        for place in read:
            if target == place:
                raise EspalierError(f"{name} {out} is read here, too: name another file to write")
            if place in target.parents and (_in_run(target, place) or (target.exists() and target.suffix != ".html")):
                raise EspalierError(f"{name} {out} lies in {place}, which is read here: name a file outside of it")


def _in_run(target: Path, top: Path) -> bool:
    from espalier.train.run import RECIPE

    inside = [folder for folder in target.parents if folder == top or top in folder.parents]
    return any((folder / RECIPE).is_file() for folder in inside)
