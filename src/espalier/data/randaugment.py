"""RandAugment with kornia's operations, drawn image by image."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from espalier.data.augment import draw_seed
from espalier.errors import require


@torch.no_grad()
def rand_augment(images_BCHW: Tensor, operations: int, magnitude: int, *, generator: torch.Generator) -> Tensor:
    """Apply ``operations`` random image operations to each image, at a common magnitude.

    Every image draws its own operations, uniformly and with replacement (Cubuk et al. 2019, arXiv 1909.13719). The
    list of operations and the meaning of a magnitude are kornia's default policy; images with other than three
    channels do without ``color``.

    Args:
        images_BCHW: floating-point images in [0, 1].
        operations: how many are applied in a row, from 1.
        magnitude: between 0 and 30, both excluded.
        generator: source of every draw.

    Returns:
        Images in [0, 1].

    Raises:
        MissingExtraError: kornia is not installed.
    """
    seed = draw_seed(generator)
    choice = torch.Generator().manual_seed(seed)
    modules = _operations(magnitude, images_BCHW.shape[1] == 3)
    drawn_NB = torch.randint(len(modules), (operations, len(images_BCHW)), generator=choice)
    result_BCHW = images_BCHW.clone()
    cuda = [images_BCHW.device] if images_BCHW.device.type == "cuda" else []
    # kornia takes no generator: it draws from torch's global streams. They are lent to it, seeded by us, and given back
    # as they were, so that neither side can disturb the other.
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        for device in cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        for drawn_B in drawn_NB:
            for index in drawn_B.unique().tolist():
                members_M = (drawn_B == index).nonzero().squeeze(1).to(images_BCHW.device)
                result_BCHW[members_M] = modules[index](result_BCHW[members_M]).clamp(0, 1)
    return result_BCHW


@lru_cache(maxsize=8)
def _operations(magnitude: int, coloured: bool) -> tuple[Any, ...]:
    # kornia's RandAugment picks one list of operations for the whole batch. One such module per operation, applied to
    # the images that drew it, gives each image its own.
    auto = require("kornia.augmentation.auto", "train")
    policy = require("kornia.augmentation.auto.rand_augment.rand_augment", "train").default_policy
    return tuple(
        auto.RandAugment(n=1, m=magnitude, policy=[step]) for step in policy if coloured or step[0][0] != "color"
    )
