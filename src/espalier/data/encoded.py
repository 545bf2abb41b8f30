"""Labelled images as they lie in files: where each one's bytes are, and nothing of it in memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from espalier.data.decode import upright_rgb
from espalier.errors import EspalierError, MissingExtraError
from espalier.files import open_regular

# Note [Fingerprint]
# Size and time of a file are not enough: an archive may give all files one time, and uncompressed images of one shape
# have one size. So three pieces of every image's content count too, all of it where it is short. Compressed images
# differ from the first pixel that differs on; a change of an uncompressed one between the pieces is found by the seal
# of decoded images alone (Note [Seal]). What the system notes by itself (ctime, inode) does not count: data that every
# job unpacks anew on its node are the same data. On two cores 100,000 files of 20 kB take 5 s where they are in memory,
# and 20 s from a cold disk.
_PIECE = 4096
_BLOCK = 256
_THREADS = 8  # which wait for a disk or a file server rather than compute

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


@dataclass(frozen=True)
class EncodedImages:
    """Where N encoded images lie, with class indices ``(N,)`` in int64.

    Names and places are arrays, not N objects: a million of them cost 75 MB, and processes that read the images share
    them.
    """

    root: Path
    files_F: np.ndarray
    """Names of the files below ``root``, as bytes."""
    labels_N: Tensor
    spans_N3: np.ndarray
    """File, first byte and length of each image; a length of −1 goes to the end of the file."""

    @classmethod
    def from_names(
        cls, root: Path, names: Iterable[str], labels: Sequence[int], spans_N3: np.ndarray | None = None
    ) -> EncodedImages:
        """Return the images of the files ``names`` below ``root``: one a file, if no spans are given."""
        files = np.array([os.fsencode(name) for name in names], dtype=np.bytes_)
        if spans_N3 is None:
            spans_N3 = np.stack([np.arange(len(files)), np.zeros(len(files), int), np.full(len(files), -1)], axis=1)
        return cls(root, files, torch.tensor(labels, dtype=torch.int64), spans_N3)

    def __len__(self) -> int:
        return len(self.labels_N)

    def take(self, indices_M: Tensor) -> EncodedImages:
        """Return the images at ``indices_M``, in that order."""
        return replace(self, labels_N=self.labels_N[indices_M], spans_N3=self.spans_N3[indices_M.numpy()])

    def place(self, index: int) -> str:
        """Return where image ``index`` lies, in words."""
        name, start, length = self._span(index)
        return str(self.root / os.fsdecode(name)) + (f" (the image at byte {start})" if length >= 0 else "")

    def open(self, index: int) -> Any:
        """Return image ``index`` as Pillow has it: upright, in RGB.

        Raises:
            EspalierError: it cannot be read or decoded; the message names the file.
            MissingExtraError: Pillow is not installed.
        """
        return self.decode(index, self.read(index))

    def read(self, index: int) -> bytes:
        """Return the encoded content of image ``index``.

        Raises:
            EspalierError: it cannot be read, or its file is no regular one; the message names the file.
        """
        name, start, length = self._span(index)
        try:
            with open_regular(self.root / os.fsdecode(name)) as file:
                file.seek(start)
                return file.read(length)
        except OSError as error:
            raise self._refusal(index, error.strerror) from error

    def decode(self, index: int, content: bytes) -> Any:
        """Return what ``open`` does, from the content that ``read`` returned.

        Raises:
            EspalierError: it cannot be decoded; the message names the file.
            MissingExtraError: Pillow is not installed.
        """
        try:
            return upright_rgb(content)
        except MissingExtraError:
            raise  # nothing is wrong with the image
        except ValueError as error:
            raise self._refusal(index, error) from error

    def changed_N(self) -> np.ndarray:
        """Return when the file of each image was last changed, which only the system sets (ctime, in ns).

        Raises:
            OSError: a file is gone.
        """
        numbers_G, place_N = np.unique(self.spans_N3[:, 0], return_inverse=True)
        changed_G = [(self.root / os.fsdecode(name)).stat().st_ctime_ns for name in self.files_F[numbers_G].tolist()]
        return np.array(changed_G, dtype=np.int64)[place_N]

    def fingerprint(self, *keys: int | str) -> str:
        """Return a digest of ``keys`` and of all images: names, sizes, times, places and a sample of their contents.

        Raises:
            EspalierError: a file is gone, cannot be read or is no regular one; the message names it.
        """
        # 4: raise it when the same bytes come to show other pixels, or caches of the old ones would be used on.
        digest = hashlib.blake2b(repr((4, *keys, str(self.root.resolve()))).encode(), digest_size=16)
        blocks = [range(at, min(at + _BLOCK, len(self))) for at in range(0, len(self), _BLOCK)]
        with ThreadPoolExecutor(_THREADS) as pool:
            for part in pool.map(self._sample, blocks):
                digest.update(part)
        return digest.hexdigest()

    def _sample(self, block: range) -> bytes:
        found = hashlib.blake2b(digest_size=16)
        for index in block:
            name, start, length = self._span(index)
            try:
                # No buffer: it would be filled, and thrown away by the next seek.
                with open_regular(Path(f"{self.root}/{os.fsdecode(name)}"), 0) as file:
                    status = os.fstat(file.fileno())
                    length = status.st_size if length < 0 else length
                    ends = (0, length // 2, length - _PIECE)
                    pieces = [(0, length)] if length <= 3 * _PIECE else [(at, _PIECE) for at in ends]
                    found.update(b"\0%s\0%d\0%d\0%d\0%d\0" % (name, status.st_size, status.st_mtime_ns, start, length))
                    for at, size in pieces:
                        file.seek(start + at)
                        found.update(file.read(size))
            except OSError as error:
                raise self._refusal(index, error.strerror) from error
        return found.digest()

    def _span(self, index: int) -> tuple[bytes, int, int]:
        """Return file, first byte and length of image ``index``; −1 is to the end of the file."""
        number, start, length = self.spans_N3[index].tolist()
        return bytes(self.files_F[number]), start, length

    def _refusal(self, index: int, reason: object) -> EspalierError:
        return EspalierError(f"cannot decode {self.place(index)} ({reason}): repair or remove it")
