"""Pictures of products of two weights, without ever holding the product."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from espalier.report.raster import Panel

SIDE = 96
"""Side of the largest picture of a product, in pixels."""


def product_picture(left_KD: Tensor, right_KD: Tensor, side: int = SIDE) -> Tensor:
    """Return ``leftᵀ right`` as at most ``side`` × ``side`` means over equal blocks.

    The mean over a block of a product is the product of the factors' means, so the d × d matrix is never held.
    """
    side = min(side, left_KD.shape[1])
    return F.adaptive_avg_pool1d(left_KD[None], side)[0].mT @ F.adaptive_avg_pool1d(right_KD[None], side)[0]


def product_panel(name: str, left_KD: Tensor, right_KD: Tensor, side: int) -> Panel:
    """Return the picture of ``leftᵀ right`` and in words the mean of its diagonal and the size of the rest."""
    # The size of the product off its diagonal, again without holding it: ‖LᵀR‖² = ⟨L Lᵀ, R Rᵀ⟩.
    diagonal_D = (left_KD * right_KD).sum(0)
    total = ((left_KD @ left_KD.mT) * (right_KD @ right_KD.mT)).sum()
    pairs = max(len(diagonal_D) * (len(diagonal_D) - 1), 1)
    rest = float(((total - diagonal_D.square().sum()).clamp_min(0) / pairs).sqrt())
    words = f"{name}: diagonal {float(diagonal_D.mean()):+.3g} on average, the other entries ± {rest:.2g}"
    return Panel(product_picture(left_KD, right_KD, side), words)
