"""The Mamba-1 recurrence as a plain loop over time: slow, obvious, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor


def selective_scan_loop(
    x_BLE: Tensor,
    delta_BLE: Tensor,
    a_EN: Tensor,
    b_BLN: Tensor,
    c_BLN: Tensor,
    d_E: Tensor | None = None,
    initial_state_BEN: Tensor | None = None,
    mask_BL: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    batch, length, channels = x_BLE.shape
    state = x_BLE.new_zeros(batch, channels, a_EN.shape[1]) if initial_state_BEN is None else initial_state_BEN
    outputs = []
    for t in range(length):
        decay = torch.exp(delta_BLE[:, t, :, None] * a_EN)
        new = decay * state + (delta_BLE[:, t] * x_BLE[:, t])[:, :, None] * b_BLN[:, t, None, :]
        y = (new * c_BLN[:, t, None, :]).sum(-1)
        if d_E is not None:
            y = y + d_E * x_BLE[:, t]
        if mask_BL is not None:
            keep = mask_BL[:, t]
            new = torch.where(keep[:, None, None], new, state)
            y = torch.where(keep[:, None], y, torch.zeros_like(y))
        state = new
        outputs.append(y)
    return torch.stack(outputs, dim=1), state
