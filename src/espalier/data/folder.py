"""Folders of images by class and shards of images, as sources: in memory, mapped from a cache, or streamed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier.data.arguments import find_data, read_arguments, unit_share
from espalier.data.augmentation import Augmentation
from espalier.data.decoded import MappedPixels, check_memory, decode_all, read_all
from espalier.data.encoded import EncodedImages
from espalier.data.images import LIMITS, ImageSource
from espalier.data.labelled import ImageData, LabelledImages
from espalier.data.layout import list_folder
from espalier.data.shards import list_shards
from espalier.data.stream import Pixels, StreamedPixels, StreamSource
from espalier.errors import EspalierError, require_known
from espalier.sizes import whole_number

if TYPE_CHECKING:
    from espalier.recipes.base import Recipe

_MOST_WORKERS, _MOST_PIXELS = 1024, 65_536
STORAGES = ("memory", "mapped", "stream")
_ARGUMENTS = {**LIMITS, "size": 64, "test_share": 0.2, "workers": None}


def folder_source(recipe: Recipe) -> ImageSource | StreamSource:
    """Return a folder of images by class: ``train/`` with ``val/`` or ``test/``, or classes alone.

    Arguments: ``size``; ``storage`` (``memory``: decoded once and held; ``mapped``: decoded once into the cache folder
    and read from there; ``stream``: decoded anew in every epoch, random crops from the whole image); ``test`` (the test
    set's subfolder, where there are several); ``test_share`` (where there is none); ``train_limit``, ``test_limit``;
    ``workers`` (processes that read, for the last two storages).
    """
    arguments = read_arguments(recipe, {**_ARGUMENTS, "storage": "memory", "test": None})
    share = unit_share("test_share", arguments["test_share"])
    listing = list_folder(find_data(recipe, "folder"), test_share=share, test=arguments["test"])
    return _source(recipe, listing, arguments)


def shards_source(recipe: Recipe) -> ImageSource | StreamSource:
    """Return images in WebDataset's shards: ``.tar`` files of ``NAME.jpg`` with the class's number in ``NAME.cls``.

    Arguments are those of a folder but ``test``, with ``storage`` ``stream`` unless another is asked for.
    """
    arguments = read_arguments(recipe, {**_ARGUMENTS, "storage": "stream"})
    listing = list_shards(find_data(recipe, "shards"), test_share=unit_share("test_share", arguments["test_share"]))
    return _source(recipe, listing, arguments)


def read_folder(root: Path, *, size: int = 64, test_share: float = 0.2) -> ImageData[LabelledImages]:
    """List a folder as ``list_folder`` does, and decode it into memory as ``decode_all`` does.

    Args:
        root: the folder.
        size: side of the images in pixels.
        test_share: share of each class that is the test set where the folder itself has none; fixed for one listing.

    Raises:
        EspalierError: a folder that cannot be used, images that cannot be decoded, no room for the cache or in memory.
        MissingExtraError: Pillow is not installed.
    """
    return _in_memory(list_folder(root, test_share=test_share), size)


def _source(recipe: Recipe, listing: ImageData[EncodedImages], arguments: dict[str, Any]) -> ImageSource | StreamSource:
    storage, size, workers = arguments["storage"], whole_number("size", arguments["size"]), arguments["workers"]
    require_known("storage", storage, STORAGES)
    if size > _MOST_PIXELS:
        raise EspalierError(f"size is {size}: give at most {_MOST_PIXELS} pixels, no picture has a longer side")
    if workers not in (None, 0) and whole_number("workers", workers) > _MOST_WORKERS:
        raise EspalierError(f"workers is {workers}: give at most {_MOST_WORKERS}, no machine runs more at once")
    listing = listing.limited(arguments["train_limit"], arguments["test_limit"])
    augmentation = Augmentation.from_recipe(recipe)
    if storage == "memory":
        return ImageSource(_in_memory(listing, size), augmentation, recipe.normalize)
    train: Pixels
    test: Pixels
    if storage == "mapped":
        train, test = (
            MappedPixels(decode_all(split, size), split.labels_N, size) for split in (listing.train, listing.test)
        )
    else:
        train, test = StreamedPixels(listing.train, size, augmentation.crop_scale), StreamedPixels(listing.test, size)
        augmentation = replace(augmentation, crop_scale=(1.0, 1.0))
    return StreamSource(train, test, listing.class_names, augmentation, recipe.normalize, workers=workers)


def _in_memory(listing: ImageData[EncodedImages], size: int) -> ImageData[LabelledImages]:
    check_memory((len(listing.train) + len(listing.test)) * 3 * size**2)
    train, test = (LabelledImages(read_all(split, size), split.labels_N) for split in (listing.train, listing.test))
    return ImageData(train, test, listing.class_names)
