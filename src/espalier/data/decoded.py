"""Decoded images in a file of their own: made once, checked, and mapped into memory rather than read."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from espalier.data.decode import central_square
from espalier.data.encoded import EncodedImages
from espalier.errors import EspalierError, require
from espalier.files import cache_folder
from espalier.memory import free_memory

_BLOCK = 256


def decode_all(images: EncodedImages, size: int) -> Path:
    """Decode all images into one .npy file of uint8 ``(N, 3, size, size)`` in the cache folder, and return its path.

    Every image is turned upright, converted to RGB, cropped centrally to a square and resized. The file bears a digest
    of the names, sizes and times of what it was made from; where there is one already, nothing is decoded. Two
    processes that want the same file make it once.

    Args:
        images: the images.
        size: side of the squares in pixels.

    Raises:
        EspalierError: images that cannot be decoded (all are listed), or no room for the file; nothing is left of it.
    """
    target = cache_folder() / f"images-{images.fingerprint(size)}.npy"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with require("filelock", "train").FileLock(target.with_suffix(".lock")):
            if not _is_whole(target, len(images), size):
                _check_room(target.parent, len(images) * 3 * size**2)
                _write(images, size, target)
    except OSError as error:
        raise EspalierError(
            f"cannot write {target} ({error.strerror}): set ESPALIER_CACHE to a folder with room"
        ) from error
    return target


@lru_cache(maxsize=8)
def map_images(path: Path) -> Tensor:
    """Return the images of a file of ``decode_all``, mapped: only what is used is read, and writes stay private."""
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def check_memory(needed: int) -> None:
    """Refuse to begin what cannot end: compare the bytes ``needed`` with the memory that is free.

    Raises:
        EspalierError: there is less; the message names the other storages.
    """
    free = free_memory()
    if needed > free:
        raise EspalierError(
            f"the decoded images take {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB of memory are free: use "
            "--data-args.storage mapped (decoded on disk) or stream (as they are), or a smaller --data-args.size"
        )


def progress(steps: Any, total: int, what: str) -> Iterator[Any]:
    """Yield what ``steps`` yields, with a bar of ``total`` steps on standard error where that is a terminal."""
    console = require("rich.console", "train").Console(stderr=True)
    track = require("rich.progress", "train").track
    yield from track(steps, what, total, console=console, transient=True, disable=not sys.stderr.isatty())


def _write(images: EncodedImages, size: int, target: Path) -> None:
    bad: list[int] = []
    reasons: list[str] = []

    def decode(index: int) -> bytes:
        try:
            return central_square(images.open(index), size).numpy().tobytes()
        except EspalierError as error:
            bad.append(index)
            reasons.append(str(error))
            return b""

    partial = target.with_suffix(".partial")
    try:
        # Pillow decodes outside the interpreter's lock, so threads suffice; blocks, because map() queues all it gets.
        with partial.open("wb") as file, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(images), 3, size, size)}
            np.lib.format.write_array_header_1_0(file, header)
            blocks = [range(start, min(start + _BLOCK, len(images))) for start in range(0, len(images), _BLOCK)]
            for block in progress(blocks, len(blocks), f"decoding {len(images)} images"):
                for pixels in pool.map(decode, block):
                    file.write(pixels)
        if len(bad) == 1:
            raise EspalierError(reasons[0])
        if bad:
            names = ", ".join(images.place(index) for index in sorted(bad)[:20])
            more = f" and {len(bad) - 20} more" if len(bad) > 20 else ""
            raise EspalierError(f"cannot decode {len(bad)} of {len(images)} images: repair or remove {names}{more}")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _is_whole(path: Path, count: int, size: int) -> bool:
    # A file that cannot be mapped is worth no more than none: it is made again.
    try:
        mapped = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return mapped.dtype == np.uint8 and mapped.shape == (count, 3, size, size)


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise EspalierError(
            f"the decoded images take {needed / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB: set ESPALIER_CACHE "
            "to a folder with room, or read the files as they are with --data-args.storage stream"
        )
