"""Mamba blocks as the small projects write them: torch calls around any scan, with the weights of one of our mixers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.nn import Mamba1, Mamba2


class PlainMamba1(nn.Module):
    """The Mamba-1 block of mamba.py and mamba-minimal around ``scan(x, delta, a, b, c, d)``."""

    def __init__(self, mixer: Mamba1, scan: Callable[..., Tensor]) -> None:
        super().__init__()
        self.mixer, self.scan = mixer, scan

    def forward(self, x: Tensor) -> Tensor:
        """Mix a (B, L, D) sequence."""
        mixer = self.mixer
        inner, z = mixer.in_proj(x).chunk(2, dim=-1)
        u = F.silu(mixer.conv1d(inner.mT)[..., : x.shape[1]].mT)
        rank, b, c = mixer.x_proj(u).split([mixer.dt_rank, mixer.state_size, mixer.state_size], dim=-1)
        delta = F.softplus(mixer.dt_proj(rank))
        return mixer.out_proj(self.scan(u, delta, -mixer.A_log.exp(), b, c, mixer.D) * F.silu(z))


class PlainMamba2(nn.Module):
    """The Mamba-2 block of mamba2-minimal around ``scan(x, delta, a, b, c, d)``, one group."""

    def __init__(self, mixer: Mamba2, scan: Callable[..., Tensor]) -> None:
        super().__init__()
        self.mixer, self.scan = mixer, scan

    def forward(self, x: Tensor) -> Tensor:
        """Mix a (B, L, D) sequence."""
        mixer = self.mixer
        z, inner, delta = mixer.in_proj(x).split([mixer.inner, mixer.conv_dim, mixer.num_heads], dim=-1)
        u = F.silu(mixer.conv1d(inner.mT)[..., : x.shape[1]].mT)
        values, b, c = u.split([mixer.inner, mixer.state_size, mixer.state_size], dim=-1)
        values = values.unflatten(-1, (mixer.num_heads, mixer.head_dim))
        delta = F.softplus(delta + mixer.dt_bias)
        y = self.scan(values, delta, -mixer.A_log.exp(), b[:, :, None], c[:, :, None], mixer.D)
        gated = y.flatten(-2) * F.silu(z)
        normed = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + 1e-5)
        return mixer.out_proj(normed * mixer.norm.weight)
