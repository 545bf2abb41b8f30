"""The seal of a file of decoded images: what every image in it was decoded from, and what came of it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from espalier.files import read_regular, write_bytes

# Note [Seal]
# The cache outlives the files that it was made from, and a disk may damage it: it is not believed unread. Its seal
# holds three things of every image:
# - A digest of its pixels, compared whenever the image is read. That takes 0.1 ms at 224 pixels, and decoding it 2 to 5
#   ms; a check of the whole file when it is opened would read the 193 GB of ImageNet before the first step.
# - A digest of the encoded content.
# - When its file last changed (ctime), which the system sets and nobody can set back. Where that is as it was, so is
#   the content. Where it is not, because the files were unpacked anew or replaced by others of equal size and time, the
#   contents are read and compared, and nothing is decoded if they are the same.
# The seal begins with a digest of itself: a damaged one is made again with its cache.
RECORD = np.dtype([("pixels", "u1", 16), ("content", "u1", 16), ("changed", "<i8")])
_OWN = hashlib.sha256().digest_size


def digest_of(content: bytes | memoryview) -> bytes:
    """Return the 16 bytes that stand for a content in a seal."""
    return hashlib.sha256(content).digest()[:16]


def seal_of(path: Path) -> Path:
    """Return the file of the seal of a file of decoded images."""
    return path.with_suffix(".seal")


def write_seal(path: Path, records_N: np.ndarray) -> None:
    """Write the seal of the decoded images at ``path``.

    Raises:
        OSError: it cannot be written.
    """
    body = records_N.tobytes()
    write_bytes(seal_of(path), hashlib.sha256(body).digest() + body)


def read_seal(path: Path, count: int) -> np.ndarray | None:
    """Return the records ``(count,)`` of the seal of the images at ``path``; None where it is missing or damaged."""
    try:
        content = read_regular(seal_of(path))
    except OSError:
        return None
    if len(content) != _OWN + count * RECORD.itemsize or hashlib.sha256(content[_OWN:]).digest() != content[:_OWN]:
        return None
    return np.frombuffer(content, RECORD, offset=_OWN)
