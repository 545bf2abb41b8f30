"""How a folder of images by class is laid out: which subfolders are splits, and which are classes."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from espalier.data.encoded import SUFFIXES, EncodedImages
from espalier.data.labelled import ImageData, set_aside
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
            candidates for one of them, a test class without training images, a class whose name is no UTF-8, or what
            ``files_below`` refuses; the message names the folder.
    """
    if not root.is_dir():
        raise EspalierError(f"{root} is not a folder: give one with a subfolder per class as --data")
    inner = _subfolders(root)
    named = {kind: [each for name in kind for each in inner if each.name.lower() == name] for kind in (_TRAIN, _TEST)}
    # A class may bear the name of a split ("train" beside "plane"); a split holds folders.
    train, tests = ([folder for folder in folders if _subfolders(folder)] for folders in named.values())
    if test is not None and not (tests := [folder for folder in inner if folder.name == test]):
        raise EspalierError(f"{root} has no subfolder {test!r}: name the one that holds the test set")
    if not train and not tests:
        whole, class_names = _list_classes(root)
        return split_off(whole, class_names, test_share)
    if not train:
        raise EspalierError(f"{root} has {tests[0].name}/ but no train/: add it, or give a folder of classes as --data")
    if len(train) > 1:
        names = " and ".join(f"{folder.name}/" for folder in train)
        raise EspalierError(f"{root} has {names}: rename or remove all but the training set")
    if not tests:
        flat = named[_TEST]
        remedy = f"sort the images of {flat[0]} by class" if flat else f"add one, or give {train[0]} as --data"
        raise EspalierError(f"{root} has {train[0].name}/ but no val/ or test/ with a folder per class: {remedy}")
    if len(tests) > 1:
        names = " and ".join(f"{folder.name}/" for folder in tests)
        raise EspalierError(f"{root} has {names}: say which is the test set, --data-args.test {tests[0].name}")
    images, class_names = _list_classes(train[0])
    tested, _ = _list_classes(tests[0], class_names)
    return ImageData(images, tested, class_names)


def split_off(whole: EncodedImages, class_names: tuple[str, ...], test_share: float) -> ImageData[EncodedImages]:
    """Set the share ``test_share`` of each class aside for the test, as ``set_aside`` does.

    Raises:
        EspalierError: one of the parts would be empty.
    """
    count = round(test_share * len(whole))
    if not 0 < count < len(whole):
        raise EspalierError(f"test_share {test_share} of {len(whole)} images leaves an empty set: change it")
    data = set_aside(whole, count, class_names, "folder")
    if not len(data.test):
        raise EspalierError(
            f"test_share {test_share} sets nothing aside, because every class has one image, which is trained on: "
            "add images, or a test set"
        )
    return data


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
        if os.fsencode(name).decode(errors="replace") != name:  # it goes into the files of a run, which are UTF-8
            raise EspalierError(f"{root / name} is a class whose name is no UTF-8: rename it")
        if name not in class_names:
            raise EspalierError(f"{root / name} is a class without training images: add some or remove it")
        files = sorted(image_names(root / name))
        if not files:
            raise EspalierError(f"{root / name} holds no image: fill or remove it ({', '.join(sorted(SUFFIXES))})")
        names += (f"{name}/{file}" for file in files)
        labels += [class_names.index(name)] * len(files)
    return EncodedImages.from_names(root, names, labels), class_names


def image_names(folder: Path) -> list[str]:
    """Return the images below ``folder`` as paths from there, as ``files_below`` does."""
    return files_below(folder, SUFFIXES)


def files_below(folder: Path, suffixes: Collection[str]) -> list[str]:
    """Return the files below ``folder`` whose names end so, in any case, as paths from there.

    Links are followed, what is hidden is left out, and nothing else is left out unsaid.

    Raises:
        EspalierError: a folder that cannot be listed, a link that leads nowhere or back to a folder that it lies in,
            or a pipe or device of such a name; the message names it.
    """
    names: list[str] = []
    # A folder, its path from the first one, and what the system knows the folders around it by.
    left: list[tuple[Path, str, tuple[tuple[int, int], ...]]] = [(folder, "", ())]
    while left:
        place, prefix, around = left.pop()
        with _named_errors(place):
            status = place.stat()
        itself = (status.st_dev, status.st_ino)
        if itself in around:
            raise EspalierError(f"{place} leads back to a folder that it lies in: remove the link")
        for entry, is_folder in _visible(place):
            if is_folder:
                left.append((place / entry.name, f"{prefix}{entry.name}/", (*around, itself)))
            elif os.path.splitext(entry.name)[1].lower() in suffixes:
                if not entry.is_file():
                    raise EspalierError(f"{entry.path} is a pipe, device or socket: remove it")
                names.append(prefix + entry.name)
    return names


def _subfolders(root: Path) -> list[Path]:
    return sorted(Path(entry) for entry, is_folder in _visible(root) if is_folder)


def _visible(folder: Path) -> Iterator[tuple[os.DirEntry[str], bool]]:
    """Yield what is in a folder and not hidden, and whether it is a folder itself, or a link to one."""
    with _named_errors(folder), os.scandir(folder) as entries:  # which knows folders from files without a look at each
        # What macOS leaves in archives counts as hidden: ._cat.jpg is no picture, though its name ends like one.
        found = [entry for entry in entries if not entry.name.startswith(".") and entry.name != "__MACOSX"]
    for entry in found:
        with _named_errors(Path(entry.path)):
            is_folder = entry.is_dir()
            # It may have been a folder of images, on a disk that is not mounted.
            if not is_folder and entry.is_symlink() and not os.path.exists(entry.path):
                raise EspalierError(f"{entry.path} is a link that leads nowhere: mend or remove it")
        yield entry, is_folder


@contextmanager
def _named_errors(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EspalierError(f"cannot list {place} ({error.strerror}): make it readable or remove it") from None
