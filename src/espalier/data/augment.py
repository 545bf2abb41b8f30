"""Augmentation of whole batches on their device; every draw comes from the generator that is handed in.

All functions take images ``(B, C, H, W)`` and return a new tensor of that shape; mixup and cutmix also return
class probabilities ``(B, K)``. kornia's own versions take no generator: they draw from torch's global stream.
"""

from __future__ import annotations

import math
import random

import torch
import torch.nn.functional as F
from torch import Tensor

from espalier.errors import EspalierError


def to_unit(pixels: Tensor) -> Tensor:
    """Return uint8 pixels as float32 in [0, 1]."""
    return pixels.float() / 255


def random_flip(images_BCHW: Tensor, *, generator: torch.Generator) -> Tensor:
    """Mirror each image left to right with probability ½."""
    flipped_B = torch.rand(len(images_BCHW), generator=generator, device=images_BCHW.device) < 0.5
    return torch.where(flipped_B[:, None, None, None], images_BCHW.flip(-1), images_BCHW)


def random_crop(images_BCHW: Tensor, padding: int, *, generator: torch.Generator) -> Tensor:
    """Shift each image by up to ``padding`` pixels along both axes: pad on all sides, crop back to size.

    The padding mirrors the image at its border, without repeating it.

    Args:
        images_BCHW: images of any dtype.
        padding: pixels added to every side.
        generator: source of the offsets, uniform over the (2·padding + 1)² crops.

    Raises:
        EspalierError: a padding that is not below the image's sides.
    """
    batch, channels, height, width = images_BCHW.shape
    if padding >= min(height, width):
        raise EspalierError(f"crop_padding is {padding} and the images are {height}×{width}: lower it")
    device = images_BCHW.device
    offsets_B2 = torch.randint(-padding, padding + 1, (batch, 2), generator=generator, device=device)
    rows_BH = offsets_B2[:, :1] + torch.arange(height, device=device)
    columns_BW = offsets_B2[:, 1:] + torch.arange(width, device=device)
    # Gather from the image itself: a padded copy of the batch is never made, and uint8 stays uint8.
    return images_BCHW[
        torch.arange(batch, device=device)[:, None, None, None],
        torch.arange(channels, device=device)[:, None, None],
        _reflected(rows_BH, height)[:, None, :, None],
        _reflected(columns_BW, width)[:, None, None, :],
    ]


def random_resized_crop(
    images_BCHW: Tensor,
    scale: tuple[float, float],
    *,
    ratio: tuple[float, float] = (1.0, 1.0),
    generator: torch.Generator,
) -> Tensor:
    """Cut a random rectangle out of each image and stretch it bilinearly to full size.

    Its area is a uniform share of the image's from ``scale``, its aspect ratio (relative to the image's) log-uniform
    from ``ratio``; a side that would leave the image is cut to it. Only enlarges, so nothing needs low-pass filtering.

    Args:
        images_BCHW: floating-point images.
        scale: smallest and largest share of the area, within (0, 1].
        ratio: smallest and largest width over height.
        generator: source of the rectangles.
    """
    batch, device = len(images_BCHW), images_BCHW.device
    draws_4B = torch.rand(4, batch, generator=generator, device=device)
    width_B, height_B = (side_B.clamp(max=1) for side_B in _sides(draws_4B[:2], scale, ratio))
    # In grid_sample's coordinates an image spans [−1, 1]; a window of relative width w has its centre in ±(1 − w).
    theta_B23 = torch.zeros(batch, 2, 3, device=device)
    theta_B23[:, 0, 0] = width_B
    theta_B23[:, 1, 1] = height_B
    theta_B23[:, 0, 2] = (1 - width_B) * (2 * draws_4B[2] - 1)
    theta_B23[:, 1, 2] = (1 - height_B) * (2 * draws_4B[3] - 1)
    grid_BHW2 = F.affine_grid(theta_B23, list(images_BCHW.shape), align_corners=False)
    return F.grid_sample(images_BCHW, grid_BHW2.to(images_BCHW.dtype), padding_mode="border", align_corners=False)


def random_erasing(images_BCHW: Tensor, probability: float, *, generator: torch.Generator) -> Tensor:
    """Overwrite a random rectangle of an image with uniform noise in [0, 1], pixel by pixel (Zhong et al. 2017).

    Its area is 2 % to a third of the image's, its height over width log-uniform from 0.3 to 1/0.3.

    Args:
        images_BCHW: floating-point images in [0, 1].
        probability: share of the images that lose a rectangle.
        generator: source of the rectangles and the noise.
    """
    batch, _, height, width = images_BCHW.shape
    device = images_BCHW.device
    draws_5B = torch.rand(5, batch, generator=generator, device=device)
    height_B, width_B = _sides(draws_5B[1:3], (0.02, 1 / 3), (0.3, 1 / 0.3), height * width)
    height_B, width_B = height_B.round().clamp(1, height), width_B.round().clamp(1, width)
    top_B = (draws_5B[3] * (height - height_B + 1)).floor()
    left_B = (draws_5B[4] * (width - width_B + 1)).floor()
    rows_BH = torch.arange(height, device=device) - top_B[:, None]
    columns_BW = torch.arange(width, device=device) - left_B[:, None]
    in_rows_BH = (rows_BH >= 0) & (rows_BH < height_B[:, None])
    in_columns_BW = (columns_BW >= 0) & (columns_BW < width_B[:, None])
    erased_BHW = in_rows_BH[:, :, None] & in_columns_BW[:, None, :] & (draws_5B[0] < probability)[:, None, None]
    noise_BCHW = torch.rand(images_BCHW.shape, generator=generator, device=device, dtype=images_BCHW.dtype)
    return torch.where(erased_BHW[:, None], noise_BCHW, images_BCHW)


def mixup(images_BCHW: Tensor, labels_BK: Tensor, alpha: float, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return λ·x + (1 − λ)·x′ and the labels mixed alike, λ ~ Beta(α, α) per batch, x′ the batch permuted.

    Source: Zhang et al. 2018, arXiv 1710.09412.

    Args:
        images_BCHW: floating-point images.
        labels_BK: class probabilities.
        alpha: the Beta distribution's parameter, above 0.
        generator: source of λ and the permutation.
    """
    stream, partner_B = _pairing(images_BCHW, generator)
    share = stream.betavariate(alpha, alpha)
    return (
        share * images_BCHW + (1 - share) * images_BCHW[partner_B],
        share * labels_BK + (1 - share) * labels_BK[partner_B],
    )


def cutmix(
    images_BCHW: Tensor, labels_BK: Tensor, alpha: float, *, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Paste one rectangle of the permuted batch into every image; labels mix by the share of pixels that remain.

    The rectangle covers 1 − λ of the area, λ ~ Beta(α, α), around a uniform centre, cut at the borders. Source: Yun et
    al. 2019, arXiv 1905.04899.

    Args:
        images_BCHW: images.
        labels_BK: class probabilities.
        alpha: the Beta distribution's parameter, above 0.
        generator: source of λ, the rectangle and the permutation.
    """
    stream, partner_B = _pairing(images_BCHW, generator)
    height, width = images_BCHW.shape[-2:]
    side = math.sqrt(1 - stream.betavariate(alpha, alpha))
    top, bottom = _span(stream.randrange(height), round(side * height), height)
    left, right = _span(stream.randrange(width), round(side * width), width)
    mixed_BCHW = images_BCHW.clone()
    mixed_BCHW[:, :, top:bottom, left:right] = images_BCHW[partner_B, :, top:bottom, left:right]
    share = 1 - (bottom - top) * (right - left) / (height * width)
    return mixed_BCHW, share * labels_BK + (1 - share) * labels_BK[partner_B]


def draw_seed(generator: torch.Generator) -> int:
    """Draw a seed for a stream that cannot be a ``torch.Generator`` of this device."""
    return int(torch.randint(2**62, (1,), generator=generator, device=generator.device))


def _pairing(images_BCHW: Tensor, generator: torch.Generator) -> tuple[random.Random, Tensor]:
    # torch draws no Beta variates from a given generator; Python's own streams do.
    stream = random.Random(draw_seed(generator))
    return stream, torch.randperm(len(images_BCHW), generator=generator, device=images_BCHW.device)


def _span(centre: int, length: int, size: int) -> tuple[int, int]:
    start = centre - length // 2
    return max(start, 0), min(start + length, size)


def _reflected(index: Tensor, size: int) -> Tensor:
    # −1 → 1 and size → size − 2: the border itself is not repeated.
    folded = index.abs()
    return torch.where(folded >= size, 2 * (size - 1) - folded, folded)


def _sides(
    draws_2B: Tensor, scale: tuple[float, float], ratio: tuple[float, float], whole: int = 1
) -> tuple[Tensor, Tensor]:
    """Return the sides of rectangles: their area a uniform share of ``whole``, one side over the other log-uniform."""
    area_B = (scale[0] + (scale[1] - scale[0]) * draws_2B[0]) * whole
    ratio_B = torch.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * draws_2B[1])
    return (area_B * ratio_B).sqrt(), (area_B / ratio_B).sqrt()
