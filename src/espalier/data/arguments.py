"""What a source reads from the recipe: its keyword arguments and the place of its files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier.errors import EspalierError, path_of, require_known

if TYPE_CHECKING:
    from espalier.recipes.base import Recipe


def read_arguments(recipe: Recipe, defaults: Mapping[str, Any], *, reads_files: bool = True) -> dict[str, Any]:
    """Return ``defaults`` overlaid with ``recipe.data_args``.

    Args:
        recipe: the run.
        defaults: every argument of the source.
        reads_files: whether the source reads files of the user's (``find_data``).

    Raises:
        EspalierError: an argument that the source does not know (the message suggests the closest ones), or a
            ``data_path`` for a source that reads no files: it would be ignored.
    """
    if recipe.data_path is not None and not reads_files:
        raise EspalierError(
            f"dataset {recipe.dataset!r} reads no files and would ignore --data {recipe.data_path}: leave it out, or "
            "choose another, such as --dataset folder"
        )
    for name in recipe.data_args:
        require_known(f"argument of dataset {recipe.dataset!r}", name, defaults)
    return {**defaults, **recipe.data_args}


def unit_share(name: str, value: Any) -> float:
    """Return ``value`` if it is a number strictly between 0 and 1.

    Raises:
        EspalierError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise EspalierError(f"{name} is {value!r}: give a share between 0 and 1")
    return float(value)


def find_data(recipe: Recipe, subfolder: str) -> Path:
    """Return the file or folder of the recipe's data: ``data_path``, else ``$ESPALIER_DATA/subfolder``.

    Raises:
        EspalierError: neither is given, or the path does not exist; the message says where it looked.
    """
    shared = os.environ.get("ESPALIER_DATA")
    if recipe.data_path is not None:
        path = path_of("data_path", recipe.data_path)
    elif shared:
        path = path_of("ESPALIER_DATA", shared) / subfolder
    else:
        raise EspalierError(
            f"dataset {recipe.dataset!r} is not bundled: say where it is with --data PATH, or set ESPALIER_DATA to the "
            f"folder that contains {subfolder}/"
        )
    if not path.exists():
        raise EspalierError(f"no dataset {recipe.dataset!r} at {path}: give its place with --data, or put it back")
    return path
