"""Labelled images as uint8 tensors, and the stratified order behind every fixed split and limit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from espalier.data.encoded import EncodedImages
from espalier.errors import EspalierError
from espalier.randomness import derive_generator
from espalier.sizes import whole_number


@dataclass(frozen=True)
class LabelledImages:
    """Images ``(N, C, H, W)`` in uint8 with class indices ``(N,)`` in int64."""

    images_NCHW: Tensor
    labels_N: Tensor

    def __len__(self) -> int:
        return len(self.labels_N)

    def take(self, indices_M: Tensor) -> LabelledImages:
        """Return the examples at ``indices_M``, in that order."""
        return LabelledImages(self.images_NCHW[indices_M], self.labels_N[indices_M])

    def to(self, device: torch.device | str) -> LabelledImages:
        """Return the examples on ``device``."""
        return LabelledImages(self.images_NCHW.to(device), self.labels_N.to(device))


Images = TypeVar("Images", LabelledImages, EncodedImages)


@dataclass(frozen=True)
class ImageData(Generic[Images]):
    """A training set, a test set and the names of the classes that their labels index.

    Raises:
        EspalierError: a class has test images and no training images.
    """

    train: Images
    test: Images
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        if untrained := _untrained(self.train, self.test):
            name = self.class_names[untrained[0]]
            raise EspalierError(
                f"class {name!r} has test images and no training images: add some, or remove its test images"
            )

    def limited(self, train_limit: Any = None, test_limit: Any = None) -> ImageData[Images]:
        """Return the first ``train_limit`` and ``test_limit`` examples of a fixed stratified order (None: all).

        Raises:
            EspalierError: a limit that is no positive whole number, or larger than the set, or a ``train_limit`` that
                leaves a class of the test set without training images; the message gives the smallest that does not.
        """
        train = _limited(self.train, "train_limit", train_limit)
        test = _limited(self.test, "test_limit", test_limit)
        if untrained := _untrained(train, test):
            order_N = stratified_order(self.train.labels_N, "limit")
            shown_N = self.train.labels_N[order_N].tolist()
            needed = 1 + max(shown_N.index(label) for label in untrained)
            raise EspalierError(
                f"train_limit is {train_limit}, and class {self.class_names[untrained[0]]!r} would be tested and never "
                f"trained: give {needed} or more"
            )
        return ImageData(train, test, self.class_names)


def _untrained(train: Images, test: Images) -> list[int]:
    """Return the labels of the classes that have test images and no training images."""
    trained = set(train.labels_N.unique().tolist())
    return [label for label in test.labels_N.unique().tolist() if label not in trained]


def stratified_order(labels_N: Tensor, *keys: int | str) -> Tensor:
    """Return a fixed permutation of ``range(N)`` every prefix of which has the class shares of the whole.

    Within a class of n examples the order is random; the r-th of them gets the key (r + ½)/n, and all are sorted by
    key. A prefix up to key t then holds round(t·n) examples of each class.

    Args:
        labels_N: class indices.
        keys: what the permutation is for; equal keys give equal permutations.
    """
    key_N = torch.empty(len(labels_N), dtype=torch.float64)
    for label in labels_N.unique().tolist():
        members_M = (labels_N == label).nonzero().squeeze(1)
        count = len(members_M)
        shuffle_M = torch.randperm(count, generator=derive_generator(0, "stratified", *keys, label))
        key_N[members_M[shuffle_M]] = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    # Ties between classes of one size fall in the order of the examples: stable, hence the same everywhere.
    return key_N.argsort(stable=True)


def set_aside(whole: Images, count: int, class_names: tuple[str, ...], key: str) -> ImageData[Images]:
    """Set ``count`` images aside for the test: of every class its share, rounded up or down, and never its last image.

    The order of each class, and which shares are rounded up, are those of the stratified order of ``key``; both parts
    keep their old order. Fewer are set aside where too many classes have one image alone.
    """
    order_N = stratified_order(whole.labels_N, key)
    labels_N = whole.labels_N[order_N]
    sizes_C = labels_N.bincount(minlength=len(class_names))
    least_C = sizes_C * count // len(whole)
    most_C = (-(-sizes_C * count // len(whole))).minimum(sizes_C - 1)
    # Place of every image within its class: sorted by class, its place in the whole less those of the classes before.
    by_class_N = labels_N.argsort(stable=True)
    rank_N = torch.empty_like(labels_N)
    rank_N[by_class_N] = torch.arange(len(whole)) - (sizes_C.cumsum(0) - sizes_C)[labels_N[by_class_N]]
    tested_N = rank_N < least_C[labels_N]
    more_M = (~tested_N & (rank_N < most_C[labels_N])).nonzero().squeeze(1)
    tested_N[more_M[: count - int(tested_N.sum())]] = True
    test_N, train_N = order_N[tested_N].sort().values, order_N[~tested_N].sort().values
    return ImageData(whole.take(train_N), whole.take(test_N), class_names)


def _limited(split: Images, name: str, limit: Any) -> Images:
    if limit is None:
        return split
    if whole_number(name, limit) > len(split):
        raise EspalierError(f"{name} is {limit}, and there are {len(split)} images: lower it")
    return split.take(stratified_order(split.labels_N, "limit")[:limit])
