"""The module that normalises pixels in [0, 1], from how often each value occurs in the training images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from espalier.errors import require_known
from espalier.nn.lipschitz.normalisation import Normalize

NORMALIZATIONS = ("mean_std", "mean", "none")


def value_counts(images_NCHW: Tensor) -> Tensor:
    """Return how often each of the 256 values occurs in each channel of uint8 images, as int64 ``(C, 256)``."""
    return torch.stack([channel.flatten().bincount(minlength=256) for channel in images_NCHW.unbind(1)])


def channel_statistics(counts_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation ``(C,)`` of each channel, as shares of 255, in float64.

    From the counts of values they are exact, and no float copy of the images is made.
    """
    values_V = torch.arange(256, dtype=torch.float64, device=counts_CV.device) / 255
    share_CV = counts_CV.double() / counts_CV.sum(1, keepdim=True)
    mean_C = share_CV @ values_V
    deviation_CV = values_V - mean_C[:, None]
    return mean_C, (share_CV * deviation_CV.square()).sum(1).sqrt()


def build_normalizer(counts_CV: Tensor, normalize: str) -> nn.Module:
    """Return the module that normalises pixels in [0, 1] by the statistics of the training images.

    Args:
        counts_CV: the counts of their values.
        normalize: ``mean_std`` (a constant channel is only centred), ``mean`` (which leaves Lipschitz constants as
            they are) or ``none`` (an ``nn.Identity``).

    Raises:
        EspalierError: unknown ``normalize``.
    """
    require_known("normalize", normalize, NORMALIZATIONS)
    if normalize == "none":
        return nn.Identity()
    mean_C, std_C = channel_statistics(counts_CV)
    if normalize == "mean":
        return Normalize(mean_C.tolist())
    return Normalize(mean_C.tolist(), torch.where(std_C > 0, std_C, 1.0).tolist())
