"""Labelled images as they lie in files: where each one's bytes are, and nothing of it in memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from espalier.data.colour import upright_rgb
from espalier.errors import EspalierError

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


@dataclass(frozen=True)
class EncodedImages:
    """Where N encoded images lie, with class indices ``(N,)`` in int64.

    The names are one array, not N objects: a million of them cost 50 MB, and processes that read the images share it.
    """

    root: Path
    files_F: np.ndarray
    """Names of the files below ``root``, as bytes."""
    labels_N: Tensor
    spans_N3: np.ndarray | None = None
    """File, first byte and length of each image; None where image i is the whole of file i."""

    @classmethod
    def from_names(
        cls, root: Path, names: Iterable[str], labels: Sequence[int], spans: Any | None = None
    ) -> EncodedImages:
        """Return the images of the files ``names`` below ``root``."""
        files = np.array([os.fsencode(name) for name in names], dtype=np.bytes_)
        return cls(root, files, torch.tensor(labels, dtype=torch.int64), spans)

    def __len__(self) -> int:
        return len(self.labels_N)

    def take(self, indices_M: Tensor) -> EncodedImages:
        """Return the images at ``indices_M``, in that order."""
        chosen = indices_M.numpy()
        if self.spans_N3 is None:
            return EncodedImages(self.root, self.files_F[chosen], self.labels_N[indices_M])
        return EncodedImages(self.root, self.files_F, self.labels_N[indices_M], self.spans_N3[chosen])

    def place(self, index: int) -> str:
        """Return where image ``index`` lies, in words."""
        if self.spans_N3 is None:
            return str(self.root / os.fsdecode(self.files_F[index]))
        number, start, _ = self.spans_N3[index].tolist()
        return f"{self.root / os.fsdecode(self.files_F[number])} (the image at byte {start})"

    def open(self, index: int) -> Any:
        """Return image ``index`` as Pillow has it: upright, in RGB.

        Raises:
            EspalierError: it cannot be read or decoded; the message names the file.
            MissingExtraError: Pillow is not installed.
        """
        number, start, length = (index, 0, -1) if self.spans_N3 is None else self.spans_N3[index].tolist()
        try:
            with (self.root / os.fsdecode(self.files_F[number])).open("rb") as file:
                file.seek(start)
                return upright_rgb(file.read(length))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise EspalierError(f"cannot decode {self.place(index)} ({reason}): repair or remove it") from error

    def fingerprint(self, *keys: int | str) -> str:
        """Return a digest of ``keys`` and of the names, sizes, times and places of all files that are used."""
        digest = hashlib.blake2b(repr((2, *keys, str(self.root.resolve()))).encode(), digest_size=16)
        for name in self.files_F.tolist():
            status = (self.root / os.fsdecode(name)).stat()
            digest.update(b"\0%s\0%d\0%d" % (name, status.st_size, status.st_mtime_ns))
        if self.spans_N3 is not None:
            digest.update(np.ascontiguousarray(self.spans_N3).tobytes())
        return digest.hexdigest()
