"""Labelled images: no class is tested that has no training images, whatever part of a set is taken."""

from __future__ import annotations

import pytest
import torch

from espalier.data.labelled import ImageData, LabelledImages, stratified_order
from espalier.errors import EspalierError

NAMES = ("cat", "dog", "hen", "owl", "fox")


def labelled(*labels: int) -> LabelledImages:
    return LabelledImages(torch.zeros(len(labels), 1, 2, 2, dtype=torch.uint8), torch.tensor(labels))


def test_a_class_that_is_tested_and_has_no_training_images_is_refused() -> None:
    with pytest.raises(EspalierError, match="class 'hen' has test images and no training images: add some") as caught:
        ImageData(labelled(0, 1, 3, 1), labelled(1, 2), NAMES)
    assert "\n" not in str(caught.value)
    assert len(ImageData(labelled(0, 1, 3, 1), labelled(3, 1, 1), NAMES).test) == 3


@pytest.mark.parametrize("counts", [[10, 10, 1], [1, 1, 1, 1], [40, 3, 2, 0, 7]])
def test_a_limit_that_leaves_a_tested_class_untrained_is_refused(counts: list[int]) -> None:
    whole = labelled(*(label for label, count in enumerate(counts) for _ in range(count)))
    data = ImageData(whole, whole, NAMES)
    order = whole.labels_N[stratified_order(whole.labels_N, "limit")].tolist()
    smallest = next(limit for limit in range(len(order) + 1) if set(order[:limit]) == set(order))
    for limit in range(1, len(order) + 1):
        if limit >= smallest:
            assert data.limited(limit).train.labels_N.tolist() == order[:limit]
            continue
        message = f"train_limit is {limit}, and class .* tested and never trained: give {smallest} or more"
        with pytest.raises(EspalierError, match=message):
            data.limited(limit)
    assert len(data.limited(1, 1).train) == 1, "the first class of the same order is the one that is tested"
