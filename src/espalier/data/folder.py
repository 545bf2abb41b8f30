"""Any folder of images by class, decoded once and cached as one uint8 array."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from espalier.data.colour import upright_rgb
from espalier.data.labelled import ImageData, LabelledImages, stratified_order
from espalier.errors import EspalierError, require
from espalier.files import cache_folder, read_tensors, write_tensors

if TYPE_CHECKING:
    import numpy as np

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def read_folder(root: Path, *, size: int = 64, test_share: float = 0.2) -> ImageData:
    """Read ``root/{train,test}/CLASS/IMAGE``, or ``root/CLASS/IMAGE`` and set a stratified share aside for the test.

    Every image is turned upright, converted to RGB, cropped centrally to a square and resized (bicubic). The result is
    kept in ``$ESPALIER_CACHE`` (else ``~/.cache/espalier``) under the names, sizes and times of all files, and read
    from there until one of them changes.

    Args:
        root: the folder.
        size: side of the images in pixels.
        test_share: share of each class that is the test set where the folder itself has none; fixed for one listing.

    Raises:
        EspalierError: no images, one that cannot be decoded, a test class without training images, no room for
            the cache; the message names the file or folder.
        MissingExtraError: Pillow is not installed.
    """
    if not root.is_dir():
        raise EspalierError(f"{root} is not a folder: give one with a subfolder per class as --data")
    split = (root / "train").is_dir() and (root / "test").is_dir()
    train = _list_classes(root / "train" if split else root)
    class_names = tuple(train)
    if not split:
        whole = _load(root, train, class_names, size)
        order_N, count = stratified_order(whole.labels_N, "folder"), round(test_share * len(whole))
        if not 0 < count < len(whole):
            raise EspalierError(f"test_share {test_share} of {len(whole)} images leaves an empty set: change it")
        test_N, train_N = order_N[:count].sort().values, order_N[count:].sort().values
        return ImageData(whole.take(train_N), whole.take(test_N), class_names)
    test = _list_classes(root / "test")
    for name in test:
        if name not in train:
            raise EspalierError(f"{root / 'test' / name} has no counterpart {root / 'train' / name}: add or remove it")
    return ImageData(
        _load(root / "train", train, class_names, size), _load(root / "test", test, class_names, size), class_names
    )


def _list_classes(root: Path) -> dict[str, list[Path]]:
    classes: dict[str, list[Path]] = {}
    for folder in sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")):
        files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        if not files:
            raise EspalierError(f"{folder} holds no image: fill or remove it ({', '.join(sorted(SUFFIXES))})")
        classes[folder.name] = files
    if not classes:
        raise EspalierError(f"{root} has no subfolder: put the images of each class into one of its own")
    return classes


def _load(root: Path, classes: dict[str, list[Path]], class_names: Sequence[str], size: int) -> LabelledImages:
    files = [file for paths in classes.values() for file in paths]
    labels_N = torch.tensor([class_names.index(name) for name, paths in classes.items() for _ in paths])
    cache = cache_folder() / f"folder-{_fingerprint(root, files, size)}.safetensors"
    images_NCHW = _read_cache(cache)
    if images_NCHW is None:
        images_NCHW = _decode_all(files, size)
        _write_cache(cache, images_NCHW)
    return LabelledImages(images_NCHW, labels_N)


def _fingerprint(root: Path, files: Sequence[Path], size: int) -> str:
    digest = hashlib.blake2b(f"1\0{size}\0{root.resolve()}".encode(), digest_size=16)
    for file in files:
        status = file.stat()
        digest.update(f"\0{file.relative_to(root)}\0{status.st_size}\0{status.st_mtime_ns}".encode())
    return digest.hexdigest()


def _decode_all(files: Sequence[Path], size: int) -> Tensor:
    images_NHWC = torch.empty(len(files), size, size, 3, dtype=torch.uint8)

    def decode_into(index: int) -> None:
        images_NHWC[index] = torch.from_numpy(_decode(files[index], size))

    # Pillow decodes outside the interpreter's lock, so threads suffice.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for _ in pool.map(decode_into, range(len(files))):
            pass
    return images_NHWC.permute(0, 3, 1, 2).contiguous()


def _decode(file: Path, size: int) -> np.ndarray:
    image_module, operations = require("PIL.Image", "train"), require("PIL.ImageOps", "train")
    import numpy as np

    try:
        upright = upright_rgb(file.read_bytes())
    except (OSError, ValueError) as error:
        raise EspalierError(f"cannot decode {file} ({error}): repair or remove it") from error
    return np.array(operations.fit(upright, (size, size), image_module.Resampling.BICUBIC))


def _read_cache(cache: Path) -> Tensor | None:
    # A cache that cannot be read is worth no more than none: decode again and overwrite it.
    try:
        return read_tensors(cache).get("images")
    except EspalierError:
        return None


def _write_cache(cache: Path, images_NCHW: Tensor) -> None:
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(cache, {"images": images_NCHW})
    except OSError as error:
        raise EspalierError(
            f"cannot write {cache} ({error.strerror}): set ESPALIER_CACHE to a folder with room"
        ) from error
