"""How a folder of images by class is laid out: which subfolders are splits, and which are classes."""

from __future__ import annotations

import os
from pathlib import Path

from espalier.data.encoded import SUFFIXES, EncodedImages
from espalier.data.labelled import ImageData, stratified_order
from espalier.errors import EspalierError

_TRAIN = ("train", "training")
_TEST = ("test", "testing", "val", "valid", "validation", "eval")


def list_folder(root: Path, *, test_share: float = 0.2, test: str | None = None) -> ImageData[EncodedImages]:
    """List ``root/train/CLASS/IMAGE`` with ``root/val`` or ``root/test``, or ``root/CLASS/IMAGE``, decoding nothing.

    Args:
        root: the folder. Names of splits count in any case, with their longer forms ("training", "validation").
        test_share: share of each class that is the test set where the folder has none; fixed for one listing.
        test: the subfolder that is the test set, for a folder that has several candidates.

    Raises:
        EspalierError: no images, one class, a test set without a training set or the other way round, two
            candidates for the test set, or a test class without training images; the message names the folder.
    """
    if not root.is_dir():
        raise EspalierError(f"{root} is not a folder: give one with a subfolder per class as --data")
    folders = {folder.name.lower(): folder for folder in _subfolders(root)}
    # A class may bear the name of a split ("train" beside "plane"); a split holds folders.
    splits = {name: folders[name] for name in (*_TRAIN, *_TEST) if name in folders and _subfolders(folders[name])}
    train = [splits[name] for name in _TRAIN if name in splits]
    tests = [splits[name] for name in _TEST if name in splits]
    if test is not None:
        tests = [folder for folder in _subfolders(root) if folder.name == test]
        if not tests:
            raise EspalierError(f"{root} has no subfolder {test!r}: name the one that holds the test set")
    if not train and not tests:
        whole, class_names = _list_classes(root)
        return split_off(whole, class_names, test_share)
    if not train:
        raise EspalierError(f"{root} has {tests[0].name}/ but no train/: add it, or give a folder of classes as --data")
    if not tests:
        flat = next((folders[name] for name in _TEST if name in folders), None)
        remedy = f"sort the images of {flat} by class" if flat else f"add one, or give {train[0]} as --data"
        raise EspalierError(f"{root} has {train[0].name}/ but no val/ or test/ with a folder per class: {remedy}")
    if len(tests) > 1:
        names = " and ".join(f"{folder.name}/" for folder in tests)
        raise EspalierError(f"{root} has {names}: say which is the test set, --data-args.test {tests[0].name}")
    images, class_names = _list_classes(train[0])
    tested, _ = _list_classes(tests[0], class_names)
    return ImageData(images, tested, class_names)


def split_off(whole: EncodedImages, class_names: tuple[str, ...], test_share: float) -> ImageData[EncodedImages]:
    """Set the share ``test_share`` of each class aside for the test; both parts keep the listing's order.

    Raises:
        EspalierError: one of the parts would be empty.
    """
    order_N, count = stratified_order(whole.labels_N, "folder"), round(test_share * len(whole))
    if not 0 < count < len(whole):
        raise EspalierError(f"test_share {test_share} of {len(whole)} images leaves an empty set: change it")
    test_N, train_N = order_N[:count].sort().values, order_N[count:].sort().values
    return ImageData(whole.take(train_N), whole.take(test_N), class_names)


def _list_classes(root: Path, class_names: tuple[str, ...] | None = None) -> tuple[EncodedImages, tuple[str, ...]]:
    found = [folder.name for folder in _subfolders(root)]
    if not found:
        raise EspalierError(f"{root} has no subfolder: put the images of each class into one of its own")
    if len(found) == 1 and class_names is None:
        raise EspalierError(f"{root} holds the class {found[0]!r} alone: give a folder with a subfolder per class")
    class_names = tuple(found) if class_names is None else class_names
    names: list[str] = []
    labels: list[int] = []
    for name in found:
        if name not in class_names:
            raise EspalierError(f"{root / name} is a class without training images: add some or remove it")
        files = sorted(image_names(root / name))
        if not files:
            raise EspalierError(f"{root / name} holds no image: fill or remove it ({', '.join(sorted(SUFFIXES))})")
        names += (f"{name}/{file}" for file in files)
        labels += [class_names.index(name)] * len(files)
    return EncodedImages.from_names(root, names, labels), class_names


def image_names(folder: Path) -> list[str]:
    """Return the images below ``folder`` as paths from there; what is hidden is no image."""
    names = []
    for place, inner, files in os.walk(folder):
        inner[:] = [name for name in inner if not _hidden(name)]
        prefix = Path(place).relative_to(folder)
        chosen = (name for name in files if os.path.splitext(name)[1].lower() in SUFFIXES and not _hidden(name))
        names += [(prefix / name).as_posix() for name in chosen]
    return names


def _subfolders(root: Path) -> list[Path]:
    with os.scandir(root) as entries:  # which knows folders from files without looking at each
        return sorted(Path(entry) for entry in entries if entry.is_dir() and not _hidden(entry.name))


def _hidden(name: str) -> bool:
    # What macOS leaves in archives: ._cat.jpg is no picture, though its name ends like one.
    return name.startswith(".") or name == "__MACOSX"
