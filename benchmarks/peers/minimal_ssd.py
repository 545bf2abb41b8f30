"""The minimal Mamba-2 listing: segment sums and einsums over all chunks at once (arXiv 2405.21060, listing 1)."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_sum(x: Tensor) -> Tensor:
    """Return Σ_{j<k≤i} x_k for every pair (i, j), −∞ above the diagonal."""
    length = x.shape[-1]
    wide = x[..., None].expand(*x.shape, length)
    below = torch.ones(length, length, dtype=torch.bool, device=x.device).tril(-1)
    sums = wide.masked_fill(~below, 0).cumsum(-2)
    return sums.masked_fill(~torch.ones_like(below).tril(), -torch.inf)


def ssd_minimal(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, *, chunk: int = 64) -> Tensor:
    """Run the Mamba-2 recurrence; the length is a multiple of ``chunk``. Layouts as in ``espalier.nn.ssd``."""
    heads, skip = x.shape[2], x * d[:, None]
    b, c = (m.repeat_interleave(heads // m.shape[2], dim=2) for m in (b, c))
    x, rate = x * delta[..., None], (delta * a)
    x, rate, b, c = (t.unflatten(1, (-1, chunk)) for t in (x, rate, b, c))
    rate = rate.permute(0, 3, 1, 2)
    cumulated = rate.cumsum(-1)
    inside = torch.exp(segment_sum(rate))
    y_inside = torch.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", c, b, inside, x)
    to_end = torch.exp(cumulated[..., -1:] - cumulated)
    states = torch.einsum("bclhn,bhcl,bclhp->bchpn", b, to_end, x)
    states = torch.cat([torch.zeros_like(states[:, :1]), states], dim=1)
    between = torch.exp(segment_sum(torch.nn.functional.pad(cumulated[..., -1], (1, 0))))
    states = torch.einsum("bhzc,bchpn->bzhpn", between, states)[:, :-1]
    y_between = torch.einsum("bclhn,bchpn,bhcl->bclhp", c, states, torch.exp(cumulated))
    return (y_inside + y_between).flatten(1, 2) + skip
