"""The manifest of a folder: the digest of every file in it, so that damage is found before anything is read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from espalier.errors import EspalierError
from espalier.files import open_regular, read_sealed, write_sealed

MANIFEST = "manifest.json"

# Note [Manifest first]
# A file and its digest cannot be replaced in one step. So the manifest comes first: it names the digest of what the
# file holds now and of what it is about to hold, and a kill between the two leaves a file that matches one of them.


def digest(content: bytes) -> str:
    """Return the SHA-256 of ``content`` in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal digits."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # typeshed wants readinto


def write_manifest(folder: Path, files: Mapping[str, Sequence[str]], notes: Mapping[str, Any] | None = None) -> None:
    """Write the manifest of a folder.

    Args:
        folder: the folder.
        files: the digests that each file may have (Note [Manifest first]).
        notes: whatever else must not change.
    """
    body = {"files": {name: list(digests) for name, digests in files.items()}, "notes": dict(notes or {})}
    write_sealed(folder / MANIFEST, body)


def read_manifest(folder: Path) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """Return the digests by file and the notes of a folder's manifest.

    Raises:
        EspalierError: it is missing, unreadable or damaged.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise EspalierError(
            f"{folder} has no {MANIFEST}: it is damaged, or an earlier version made it; train into another folder"
        )
    content = read_sealed(path, "manifest")
    files: Any = content.get("files")
    notes: Any = content.get("notes")
    whole = len(content) == 2 and isinstance(files, dict) and isinstance(notes, dict)
    if not (whole and all(isinstance(digests, list) for digests in files.values())):
        raise EspalierError(f"{path} is damaged: restore it from a copy, or train into another folder")
    return files, notes


def damaged(folder: Path, names: Iterable[str] | None = None) -> str | None:
    """Return the first file of a folder that is missing or whose content is not that of the manifest, None if all are.

    Args:
        folder: the folder.
        names: which files; all that the manifest names by default.

    Raises:
        EspalierError: as ``read_manifest``.
        OSError: a file that is there cannot be read.
    """
    files, _ = read_manifest(folder)
    for name in files if names is None else names:
        if not (folder / name).is_file() or file_digest(folder / name) not in files.get(name, ()):
            return name
    return None
