"""Files whose content is checked before it is used."""

from __future__ import annotations

import hashlib
from pathlib import Path

from espalier.errors import EspalierError


def read_checked(path: Path, md5: str) -> bytes:
    """Return the content of ``path`` after comparing its md5 with the published one.

    The bytes that were hashed are the bytes returned, so nobody can swap the file in between.

    Raises:
        EspalierError: the file is missing, unreadable or not the published one; the message names it.
    """
    content = read_file(path)
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        raise EspalierError(f"{path} has md5 {found}, the published file {md5}: fetch it again")
    return content


def read_file(path: Path) -> bytes:
    """Return the content of ``path``.

    Raises:
        EspalierError: the file is missing or unreadable; the message names it.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise EspalierError(f"cannot read {path} ({error.strerror}): give the folder with --data") from error
