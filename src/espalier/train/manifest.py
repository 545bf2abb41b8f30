"""The manifest of a folder: the digest of every file in it, so that damage is found before anything is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from espalier.errors import EspalierError
from espalier.files import open_regular, read_object, write_json

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
    write_json(folder / MANIFEST, {**body, "digest": digest(_canonical(body))})


def read_manifest(folder: Path) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """Return the digests by file and the notes of a folder's manifest.

    Raises:
        EspalierError: it is missing or damaged.
        OSError: it cannot be read.
    """
    path = folder / MANIFEST
    try:
        content = read_object(path)
        stated = content.pop("digest")
        intact = stated == digest(_canonical(content))
        files, notes = content["files"], content["notes"]
    except FileNotFoundError:
        raise EspalierError(
            f"{folder} has no {MANIFEST}: it is damaged, or an earlier version made it; train into another folder"
        ) from None
    except OSError:
        if path.is_file():  # and perhaps whole: it only cannot be read now
            raise
        intact = False
    except (ValueError, KeyError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise EspalierError(f"{path} is damaged: restore it from a copy, or train into another folder")
    return files, notes


def damaged(folder: Path, names: Iterable[str] | None = None, skip: Iterable[str] = ()) -> str | None:
    """Return the first file of a folder that is missing or whose content is not that of the manifest, None if all are.

    Args:
        folder: the folder.
        names: which files; all that the manifest names by default.
        skip: files not to look at.

    Raises:
        EspalierError: the manifest is missing or damaged.
        OSError: a file that is there cannot be read.
    """
    files, _ = read_manifest(folder)
    for name in files.keys() - set(skip) if names is None else names:
        try:
            if file_digest(folder / name) not in files.get(name, ()):
                return name
        except OSError:
            if (folder / name).is_file():  # and perhaps whole: it only cannot be read now
                raise
            return name
    return None


def _canonical(body: Any) -> bytes:
    return json.dumps(body, sort_keys=True).encode()
