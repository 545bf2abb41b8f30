"""Decoded images in a file of their own: made once, checked, and mapped into memory rather than read."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from espalier.data.decode import central_square
from espalier.data.encoded import EncodedImages
from espalier.data.seal import RECORD, digest_of, read_seal, seal_of, write_seal
from espalier.errors import EspalierError, require
from espalier.files import cache_folder, lock_at, require_regular, shown
from espalier.memory import free_memory

_BLOCK = 256


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
    pixels_N3HW = _load(path, "c")
    seal = None if pixels_N3HW is None else read_seal(path, len(pixels_N3HW))
    if pixels_N3HW is None or seal is None:
        raise EspalierError(f"decoded images {path} or their seal are gone or damaged: run the same command again")
    return pixels_N3HW, seal


def read_all(images: EncodedImages, size: int) -> Tensor:
    """Return the images of ``decode_all`` in memory, each held to its seal; a damaged file is made again.

    Raises:
        EspalierError: as ``decode_all``, or the file is damaged as soon as it is written.
    """
    for _ in range(2):
        path = decode_all(images, size)
        pixels_N3HW, seal = _load(path), read_seal(path, len(images))
        if pixels_N3HW is not None and seal is not None and all(map(_is_sealed, pixels_N3HW, seal)):
            return torch.from_numpy(pixels_N3HW)
        seal_of(path).unlink(missing_ok=True)
    raise EspalierError(f"decoded images {path} are not what was written: set ESPALIER_CACHE to a folder that is sound")


def read_mapped(path: Path, index: int) -> Tensor:
    """Return image ``index`` of a file of ``decode_all``, held to its seal; of the others nothing is read.

    Raises:
        EspalierError: it is damaged. The seal is broken then, so that the next run makes the file again.
    """
    pixels_N3HW, seal = map_images(path)
    if not _is_sealed(pixels_N3HW[index], seal[index]):
        with contextlib.suppress(OSError):
            seal_of(path).unlink()
        raise EspalierError(
            f"decoded image {index} in {path} is damaged: run the same command again, which makes the file anew"
        )
    return torch.from_numpy(pixels_N3HW[index])


def mapped_digest(path: Path, indices_M: Tensor) -> str:
    """Return a digest of the pixels of the images at ``indices_M``, as the seal of their file has them."""
    return digest_of(map_images(path)[1]["pixels"][indices_M.numpy()].tobytes()).hex()


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


def _load(path: Path, mapped: Literal["r", "c"] | None = None) -> np.ndarray | None:
    try:
        require_regular(path)
        return np.load(path, mmap_mode=mapped)
    except MemoryError:
        raise
    except Exception:  # numpy raises half a dozen kinds for a damaged header, the tokenizer's among them
        return None  # worth no more than none


def _is_sealed(pixels_3HW: np.ndarray, record: np.ndarray) -> bool:
    return digest_of(np.ascontiguousarray(pixels_3HW).data) == record["pixels"].tobytes()


def _write(images: EncodedImages, size: int, target: Path) -> None:
    bad: list[int] = []
    reasons: list[str] = []
    records_N = np.zeros(len(images), RECORD)
    records_N["changed"] = images.changed_N()  # before they are read: a change after that is a later one

    def decode(index: int) -> bytes:
        try:
            content = images.read(index)
            pixels = central_square(images.decode(index, content), size).numpy().tobytes()
        except EspalierError as error:
            bad.append(index)
            reasons.append(str(error))
            return b""
        records_N["pixels"][index] = np.frombuffer(digest_of(pixels), np.uint8)
        records_N["content"][index] = np.frombuffer(digest_of(content), np.uint8)
        return pixels

    partial = target.with_suffix(".partial")
    try:
        # Pillow decodes outside the interpreter's lock, so threads suffice; blocks, because map() queues all it gets.
        with partial.open("wb") as file, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(images), 3, size, size)}
            np.lib.format.write_array_header_1_0(file, header)
            for block in progress(_blocks(images), len(_blocks(images)), f"decoding {len(images)} images"):
                for pixels in pool.map(decode, block):
                    file.write(pixels)
            file.flush()
            os.fsync(file.fileno())  # or a power cut after the rename leaves the name and nothing of the content
        if len(bad) == 1:
            raise EspalierError(reasons[0])
        if bad:
            names = ", ".join(shown(images.place(index)) for index in sorted(bad)[:20])
            more = f" and {len(bad) - 20} more" if len(bad) > 20 else ""
            raise EspalierError(f"cannot decode {len(bad)} of {len(images)} images: repair or remove {names}{more}")
        # The seal comes last: beside a file that is no longer its own it is found wrong, and both are made again.
        os.replace(partial, target)
        write_seal(target, records_N)
    finally:
        partial.unlink(missing_ok=True)


def _is_current(images: EncodedImages, size: int, path: Path) -> bool:
    """Return whether the decoded images at ``path`` are whole and sealed as those of these contents."""
    mapped, seal = _load(path, "r"), read_seal(path, len(images))
    if mapped is None or seal is None or mapped.dtype != np.uint8 or mapped.shape != (len(images), 3, size, size):
        return False
    changed_N = images.changed_N()
    if (seal["changed"] == changed_N).all():
        return True

    def differs(index: int) -> bool:
        return bool(seal["changed"][index] != changed_N[index]) and (
            digest_of(images.read(index)) != seal["content"][index].tobytes()
        )

    try:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for block in progress(_blocks(images), len(_blocks(images)), f"comparing {len(images)} images"):
                if any(pool.map(differs, block)):
                    return False
    except EspalierError:
        return False  # decoding names all that cannot be read
    records_N = seal.copy()
    records_N["changed"] = changed_N
    with contextlib.suppress(OSError):  # nothing is lost but the time
        write_seal(path, records_N)
    return True


def _blocks(images: EncodedImages) -> list[range]:
    return [range(start, min(start + _BLOCK, len(images))) for start in range(0, len(images), _BLOCK)]


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise EspalierError(
            f"the decoded images take {needed / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB: set ESPALIER_CACHE "
            "to a folder with room, or read the files as they are with --data-args.storage stream"
        )
