"""WebDataset's shards: where the images lie within .tar files, so that any one can be read without the others."""

from __future__ import annotations

import os
import re
import tarfile
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from espalier.data.decoded import progress
from espalier.data.encoded import SUFFIXES, EncodedImages
from espalier.data.labelled import ImageData
from espalier.data.layout import files_below, split_off
from espalier.errors import EspalierError
from espalier.files import open_regular

_MOST_CLASSES = 1_000_000
_TAR_BLOCK = 512
_CLASS = ".cls"
# A split in the name of a shard or its folder: "train/0000.tar", "imagenet1k-validation-07.tar", "Train_3.tar".
_SPLIT = re.compile(r"(?<![a-z])(?:(train|training)|(val|valid|validation|test|testing|eval))(?![a-z])")


def list_shards(root: Path, *, test_share: float = 0.2) -> ImageData[EncodedImages]:
    """List the images of all ``.tar`` files below ``root``, decoding nothing.

    A sample is the files of one name up to its first point: an image, and ``NAME.cls`` with the number of its class
    in digits; files of other endings are left out. Shards are training or test sets by their own or their folder's
    name; where no name says so, a share of each class is set aside. Only headers are read. The images of an epoch are
    then read in the order that a folder's would be, each by itself: shuffled as a whole, and not within a buffer.

    Args:
        root: a folder of shards, or one shard.
        test_share: share of each class that is the test set where no shard is named as one; fixed for one listing.

    Raises:
        EspalierError: no shards, a damaged or compressed one, a sample without an image or a class, an image or class
            that is a link or has a point within its name, a class number that is none, training shards without test
            shards or the other way round; the message names the shard.
    """
    base = root if root.is_dir() else root.parent
    shards = sorted(root / name for name in files_below(root, {".tar"})) if root.is_dir() else [root]
    if not shards:
        packed = next((path for path in base.rglob("*.tar.*")), None)
        remedy = f"unpack {packed} to .tar" if packed else "give a folder of shards as --data"
        raise EspalierError(f"{root} holds no .tar file: {remedy}")
    names = [path.relative_to(base).as_posix() for path in shards]
    kinds = [_split_of(name) for name in names]
    listing = enumerate(progress(shards, len(shards), "listing shards"))
    rows_N4 = np.array([(number, *row) for number, path in listing for row in _samples(path)], dtype=np.int64)
    whole = EncodedImages.from_names(base, names, rows_N4[:, 1].tolist(), rows_N4[:, [0, 2, 3]])
    if not any(kinds):
        return split_off(whole, _class_names(whole), test_share)
    if set(kinds) != {"train", "test"}:
        unnamed = [name for name, kind in zip(names, kinds, strict=True) if not kind]
        wrong = f"{unnamed[0]} is of no split" if unnamed else f"all are {kinds[0]} shards"
        raise EspalierError(f"shards in {root}: {wrong}: name all of them or their folders train, val or test, or none")
    kind_N = np.array(kinds)[rows_N4[:, 0]]
    train, test = (whole.take(torch.from_numpy((kind_N == kind).nonzero()[0])) for kind in ("train", "test"))
    try:
        return ImageData(train, test, _class_names(whole))
    except EspalierError as error:
        raise EspalierError(f"shards in {root}: {error}") from None


def _split_of(name: str) -> str:
    # The file's own name counts first: val/train-like words further up may be somebody's folder.
    for part in reversed(name.lower().split("/")):
        if found := _SPLIT.search(part):
            return "train" if found[1] else "test"
    return ""


def _class_names(images: EncodedImages) -> tuple[str, ...]:
    # A part of a set need not hold every class; the numbers up to the highest are all taken as such.
    return tuple(map(str, range(int(images.labels_N.max()) + 1)))


def _samples(shard: Path) -> list[tuple[int, int, int]]:
    """Return class, first byte and length of every image of a shard, in its order."""
    places: dict[str, tuple[int, int]] = {}
    classes: dict[str, int] = {}
    try:
        with open_regular(shard) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                sample, ending = _name_of(shard, member)
                if ending in SUFFIXES:
                    if sample in places:
                        raise EspalierError(f"shard {shard} holds two images of the name {sample}: rename one")
                    if member.issparse():  # its bytes lie without their zeros, and are not read through tarfile
                        raise EspalierError(f"shard {shard}: {member.name} is stored with gaps: pack without tar -S")
                    places[sample] = member.offset_data, member.size
                elif ending == _CLASS:
                    text = archive.extractfile(member).read(20).decode("ascii", "replace").strip()  # type: ignore[union-attr]
                    if not (text.isascii() and text.isdigit()) or int(text) > _MOST_CLASSES:
                        raise EspalierError(f"shard {shard}: {member.name} holds {text!r}: write the number of a class")
                    if classes.setdefault(sample, int(text)) != int(text):
                        raise EspalierError(f"shard {shard} holds two classes of the name {sample}: rename one")
            _check_end(file, archive.offset)
    except EspalierError:
        raise
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:  # the last two of sizes beyond all files
        reason = error.strerror if isinstance(error, OSError) else error
        raise EspalierError(
            f"cannot read shard {shard} ({reason}): repair it, or unpack it if it is compressed"
        ) from error
    if odd := places.keys() ^ classes.keys():
        name = min(odd)
        missing = "class: add its number as .cls" if name in places else "image: add it or remove its .cls"
        raise EspalierError(f"shard {shard}: sample {name.lstrip('/')} has no {missing}")
    if not places:
        raise EspalierError(f"shard {shard} holds no image: remove it ({', '.join(sorted(SUFFIXES))})")
    return [(classes[name], *place) for name, place in places.items()]


def _name_of(shard: Path, member: tarfile.TarInfo) -> tuple[str, str]:
    """Return which sample a member is of and what it is, ``.cls`` or the suffix of an image; "" for anything else.

    Raises:
        EspalierError: its name ends as that of an image or a class, and it is none that a sample can have.
    """
    folder, _, name = member.name.rpartition("/")
    suffix = os.path.splitext(name)[1].lower()
    if member.isdir() or name.startswith(".") or suffix not in SUFFIXES | {_CLASS}:
        return "", ""
    stem, _, ending = name.partition(".")
    if f".{ending.lower()}" != suffix:
        raise EspalierError(
            f"shard {shard}: {member.name} has a point within its name, and a sample is named up to its first point: "
            f"rename it, as {name[: -len(suffix)].replace('.', '_')}{suffix}, or leave it out"
        )
    if not member.isfile():
        raise EspalierError(
            f"shard {shard}: {member.name} is a link or no file: pack with tar --dereference --hard-dereference, or "
            "leave it out"
        )
    return f"{folder}/{stem}", suffix


def _check_end(file: BinaryIO, place: int) -> None:
    """Refuse an archive that does not end at ``place``, behind the last member: with two blocks or more of zeros alone.

    tarfile takes any header that it cannot read for the end, and with it goes whatever follows.

    Raises:
        tarfile.ReadError: there are fewer, or something follows.
    """
    file.seek(place)
    length = 0
    while chunk := file.read(1 << 20):
        if chunk.count(0) != len(chunk):
            raise tarfile.ReadError(f"damaged, or archives one behind the other: the header at byte {place} is none")
        length += len(chunk)
    if length < 2 * _TAR_BLOCK:
        raise tarfile.ReadError(
            f"cut off at byte {place + length}: the blocks of zeros that end an archive are missing"
        )
