"""Decoded images in a file of their own: made once, checked, and mapped into memory rather than read."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from espalier.data.decode import central_square
from espalier.data.encoded import EncodedImages
from espalier.errors import EspalierError, MissingExtraError, require
from espalier.files import cache_folder, lock_at, read_regular, require_regular, write_bytes
from espalier.memory import free_memory

_BLOCK = 256
_Result = TypeVar("_Result")
_STORAGES = "use --data-args.storage mapped (decoded on disk) or stream (as they are), or a smaller --data-args.size"

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
_RECORD = np.dtype([("pixels", "u1", 16), ("content", "u1", 16), ("changed", "<i8")])
_OWN = hashlib.sha256().digest_size


def decode_all(images: EncodedImages, size: int) -> Path:
    """Decode all images into one .npy file of uint8 ``(N, 3, size, size)`` in the cache folder, and return its path.

    Every image is turned upright, converted to RGB, cropped centrally to a square and resized. The file bears the
    fingerprint of what it was made from, and a seal lies beside it (Note [Seal]); where there is one already that
    stands for the same contents, nothing is decoded. Two processes that want the same file make it once.

    Args:
        images: the images.
        size: side of the squares in pixels.

    Raises:
        EspalierError: images that cannot be decoded (all are listed), or no room for the file; nothing is left of it.
        MissingExtraError: Pillow is not installed.
    """
    target = cache_folder() / f"images-{images.fingerprint(size)}.npy"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with lock_at(target.with_suffix(".lock"), math.inf):
            if not _is_current(images, size, target):
                _check_room(target.parent, len(images) * 3 * size**2)
                _write(images, size, target)
                map_images.cache_clear()
    except OSError as error:
        raise EspalierError(
            f"cannot write {target} ({error.strerror}): set ESPALIER_CACHE to a folder with room"
        ) from error
    return target


@lru_cache(maxsize=8)
def map_images(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the images of a file of ``decode_all``, mapped (only what is used is read), and the records of its seal.

    Raises:
        EspalierError: one of the two is gone or damaged since ``decode_all``.
    """
    # Mapped for private writes, because torch warns of what it must not write to.
    if (found := _open(path, "c")) is None:
        raise EspalierError(f"decoded images {path} or their seal are gone or damaged: run the same command again")
    return found


def read_all(images: EncodedImages, size: int) -> Tensor:
    """Return the images of ``decode_all`` in memory, each held to its seal; a damaged file is made again.

    Raises:
        EspalierError: as ``decode_all``, or the file is damaged as soon as it is written.
    """
    for _ in range(2):
        path = decode_all(images, size)
        if (found := _open(path)) is not None and all(map(_is_sealed, *found)):
            return torch.from_numpy(found[0])
        _seal_of(path).unlink(missing_ok=True)
    raise EspalierError(f"decoded images {path} are not what was written: set ESPALIER_CACHE to a folder that is sound")


@dataclass(frozen=True)
class MappedPixels:
    """Images that lie decoded in a file of ``decode_all``: nothing is decoded, and only what is asked for is read."""

    path: Path
    labels_N: Tensor
    size: int

    def read(self, index: int, generator: torch.Generator | None) -> Tensor:
        """Return image ``index`` as uint8 ``(3, size, size)``, in training too: its crop is left to the device.

        Raises:
            EspalierError: it is not as it was decoded. The seal is broken then, so that the next run makes the file
                again.
        """
        pixels_N3HW, seal = map_images(self.path)
        if not _is_sealed(pixels_N3HW[index], seal[index]):
            with contextlib.suppress(OSError):
                _seal_of(self.path).unlink()
            raise EspalierError(
                f"decoded image {index} in {self.path} is damaged: run the same command again for a new one"
            )
        return torch.from_numpy(pixels_N3HW[index])

    def fingerprint(self, indices_M: Tensor) -> str:
        """Return a digest of the pixels of the images at ``indices_M``, as the seal of their file has them."""
        return _digest_of(map_images(self.path)[1]["pixels"][indices_M.numpy()].tobytes()).hex()


def check_memory(needed: int, remedy: str = _STORAGES) -> None:
    """Refuse to begin what cannot end: compare the bytes ``needed`` with the memory that is free.

    Raises:
        EspalierError: there is less; the message ends with the remedy, by default the other storages.
    """
    free = free_memory()
    if needed > free:
        raise EspalierError(
            f"the decoded images take {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB of memory are free: {remedy}"
        )


def progress(steps: Any, total: int, what: str) -> Iterator[Any]:
    """Yield what ``steps`` yields, with a bar of ``total`` steps on standard error where that is a terminal."""
    bar = require("rich.progress", "train").Progress(
        console=require("rich.console", "train").Console(stderr=True),
        # Without a thread of its own, which could not end where an error of the caller leaves this generator behind.
        auto_refresh=False, transient=True, disable=not sys.stderr.isatty(),
    )  # fmt: skip
    with bar:
        task, shown = bar.add_task(what, total=total), 0.0
        for step in steps:
            yield step
            bar.advance(task)
            if time.monotonic() > shown + 0.1:
                shown = time.monotonic()
                bar.refresh()


def _open(path: Path, mapped: Literal["r", "c"] | None = None) -> tuple[np.ndarray, np.ndarray] | None:
    """Return decoded images and the records of their seal; None, worth no more, where one is missing or damaged."""
    try:
        require_regular(path)
        pixels_N3HW = np.load(path, mmap_mode=mapped)
        sealed = read_regular(_seal_of(path))
        own, body = sealed[:_OWN], sealed[_OWN:]
        if len(body) != pixels_N3HW.shape[0] * _RECORD.itemsize or hashlib.sha256(body).digest() != own:
            return None
    except MemoryError:
        raise
    except Exception:  # numpy raises half a dozen kinds for a damaged header, the tokenizer's among them
        return None
    return pixels_N3HW, np.frombuffer(body, _RECORD)


def _seal_of(path: Path) -> Path:
    return path.with_suffix(".seal")


def _write_seal(path: Path, records_N: np.ndarray) -> None:
    body = records_N.tobytes()
    write_bytes(_seal_of(path), hashlib.sha256(body).digest() + body)


def _digest_of(content: bytes | memoryview) -> bytes:
    return hashlib.sha256(content).digest()[:16]


def _is_sealed(pixels_3HW: np.ndarray, record: np.ndarray) -> bool:
    return _digest_of(np.ascontiguousarray(pixels_3HW).data) == record["pixels"].tobytes()


def _write(images: EncodedImages, size: int, target: Path) -> None:
    bad: dict[int, str] = {}
    records_N = np.zeros(len(images), _RECORD)
    records_N["changed"] = images.changed_N()  # before they are read: a change after that is a later one

    def decode(index: int) -> bytes:
        try:
            content = images.read(index)
            pixels = central_square(images.decode(index, content), size).numpy().tobytes()
        except MissingExtraError:
            raise
        except EspalierError as error:
            bad[index] = str(error)
            return b""
        records_N["pixels"][index] = np.frombuffer(_digest_of(pixels), np.uint8)
        records_N["content"][index] = np.frombuffer(_digest_of(content), np.uint8)
        return pixels

    partial = target.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(images), 3, size, size)}
            np.lib.format.write_array_header_1_0(file, header)
            file.writelines(_in_threads(decode, range(len(images)), "decoding"))
            file.flush()
            os.fsync(file.fileno())  # or a power cut after the rename leaves the name and nothing of the content
        if len(bad) == 1:
            raise EspalierError(*bad.values())
        if bad:
            names = ", ".join(images.place(index) for index in sorted(bad)[:20])
            more = f" and {len(bad) - 20} more" if len(bad) > 20 else ""
            raise EspalierError(f"cannot decode {len(bad)} of {len(images)} images: repair or remove {names}{more}")
        # The seal comes last: beside a file that is no longer its own it is found wrong, and both are made again.
        os.replace(partial, target)
        _write_seal(target, records_N)
    finally:
        partial.unlink(missing_ok=True)


def _is_current(images: EncodedImages, size: int, path: Path) -> bool:
    """Return whether the decoded images at ``path`` are whole and sealed as those of these contents."""
    found = _open(path, "r")
    if found is None or found[0].dtype != np.uint8 or found[0].shape != (len(images), 3, size, size):
        return False
    records_N, changed_N = found[1].copy(), images.changed_N()
    touched_M = (records_N["changed"] != changed_N).nonzero()[0]
    if not len(touched_M):
        return True

    def differs(index: int) -> bool:
        return _digest_of(images.read(index)) != records_N["content"][index].tobytes()

    try:
        if any(_in_threads(differs, touched_M.tolist(), "comparing")):
            return False
    except EspalierError:
        return False  # decoding names all that cannot be read
    records_N["changed"] = changed_N
    with contextlib.suppress(OSError):  # nothing is lost but the time
        _write_seal(path, records_N)
    return True


def _in_threads(work: Callable[[int], _Result], indices: Sequence[int], doing: str) -> Iterator[_Result]:
    """Yield what comes of ``work`` on each of ``indices``, in their order."""
    starts = range(0, len(indices), _BLOCK)
    # Pillow decodes outside the interpreter's lock, so threads suffice; blocks, because map() queues all it gets.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in progress(starts, len(starts), f"{doing} {len(indices)} images"):
            yield from pool.map(work, indices[start : start + _BLOCK])


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise EspalierError(
            f"the decoded images take {needed / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB: set ESPALIER_CACHE "
            "to a folder with room, or read the files as they are with --data-args.storage stream"
        )
