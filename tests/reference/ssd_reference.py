"""The Mamba-2 recurrence as a plain loop over time, heads and groups written out."""

from __future__ import annotations

import torch
from torch import Tensor


def ssd_loop(
    x_BLHP: Tensor,
    delta_BLH: Tensor,
    a_H: Tensor,
    b_BLGN: Tensor,
    c_BLGN: Tensor,
    d_H: Tensor | None = None,
    initial_state_BHNP: Tensor | None = None,
    mask_BL: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    batch, length, heads, width = x_BLHP.shape
    groups, size = b_BLGN.shape[2:]
    outputs, states = [], []
    for head in range(heads):
        group = head // (heads // groups)
        if initial_state_BHNP is None:
            state = x_BLHP.new_zeros(batch, size, width)
        else:
            state = initial_state_BHNP[:, head]
        ys = []
        for t in range(length):
            step = delta_BLH[:, t, head, None, None]
            outer = b_BLGN[:, t, group, :, None] * x_BLHP[:, t, head, None, :]
            new = torch.exp(step * a_H[head]) * state + step * outer
            y = (c_BLGN[:, t, group, :, None] * new).sum(1)
            if d_H is not None:
                y = y + d_H[head] * x_BLHP[:, t, head]
            if mask_BL is not None:
                keep = mask_BL[:, t]
                new = torch.where(keep[:, None, None], new, state)
                y = torch.where(keep[:, None], y, torch.zeros_like(y))
            state = new
            ys.append(y)
        outputs.append(torch.stack(ys, dim=1))
        states.append(state)
    return torch.stack(outputs, dim=2), torch.stack(states, dim=1)
