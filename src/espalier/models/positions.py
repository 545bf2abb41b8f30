"""Fixed two-dimensional sine-cosine position embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from espalier.errors import EspalierError


def sincos_positions(height: int, width: int, dim: int, temperature: float = 10000.0) -> Tensor:
    """Return the fixed 2-D sine-cosine embedding of a grid of patches.

    With ω_i = temperature^(−i/(dim/4)), patch (y, x) gets ``[sin(x ω), cos(x ω), sin(y ω), cos(y ω)]``, unscaled.

    Args:
        height: rows of patches.
        width: columns of patches.
        dim: width of the embedding, a multiple of 4.
        temperature: longest wavelength over 2π.

    Returns:
        Shape (height · width, dim), rows first.

    Raises:
        EspalierError: a width that is no multiple of 4.

    Source: the "simple ViT" baseline (arXiv 2205.01580), section 2, as mimetic initialisation uses it.
    """
    if dim % 4:
        raise EspalierError(f"embed_dim {dim} is no multiple of 4: sine-cosine positions need four equal parts")
    omega = temperature ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles_y, angles_x = y.reshape(-1, 1) * omega, x.reshape(-1, 1) * omega
    return torch.cat([angles_x.sin(), angles_x.cos(), angles_y.sin(), angles_y.cos()], dim=1).float()
