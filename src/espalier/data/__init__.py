"""Data: sources of batches by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from espalier.data.folder import folder_source, shards_source
from espalier.data.images import ImageSource, cifar10_source, digits_source, fashion_mnist_source
from espalier.data.loaders import LoaderSource, own_source
from espalier.data.sequences import GeneratedSource, copying_source, mqar_source, ngram_lookup_source, sorting_source
from espalier.data.source import Source
from espalier.data.stream import StreamSource
from espalier.data.text import TextSource, text_source
from espalier.errors import require_known
from espalier.lookup import is_reference

if TYPE_CHECKING:
    from espalier.recipes.base import Recipe

__all__ = [
    "SOURCES",
    "GeneratedSource",
    "ImageSource",
    "LoaderSource",
    "Source",
    "StreamSource",
    "TextSource",
    "build_source",
]

SOURCES: dict[str, Callable[[Recipe], Source]] = {
    "cifar10": cifar10_source,
    "copying": copying_source,
    "digits": digits_source,
    "fashion_mnist": fashion_mnist_source,
    "folder": folder_source,
    "mqar": mqar_source,
    "ngram_lookup": ngram_lookup_source,
    "shards": shards_source,
    "sorting": sorting_source,
    "text": text_source,
    "tinyshakespeare": text_source,
}
"""Factories by the name that a recipe's ``data`` gives; add your own."""


def build_source(recipe: Recipe) -> Source:
    """Return the recipe's data, on the CPU, as its fields from ``data`` to ``normalize`` describe it.

    ``dataset`` may also name a function of your own, ``FILE.py:NAME`` (see ``own_source``).

    Raises:
        EspalierError: unknown data or argument, missing or damaged files, a field out of its range.
    """
    if is_reference(recipe.dataset):
        return own_source(recipe)
    require_known("dataset", recipe.dataset, SOURCES)
    return SOURCES[recipe.dataset](recipe)
