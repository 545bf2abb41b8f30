"""Adapters to mamba_ssm's CUDA kernels: their layouts in, ours out. Imported on a CUDA device only."""

from __future__ import annotations

import torch
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
from torch import Tensor


def selective_scan_mamba_ssm(
    x_BLE: Tensor, delta_BLE: Tensor, a_EN: Tensor, b_BLN: Tensor, c_BLN: Tensor, d_E: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run ``selective_scan_fn``, whose tensors are channel-first, and return (y, final state)."""
    x, delta, b, c = (t.transpose(1, 2).contiguous() for t in (x_BLE, delta_BLE, b_BLN, c_BLN))
    y, state = selective_scan_fn(x, delta, a_EN, b, c, d_E, return_last_state=True)
    return y.transpose(1, 2), state


def ssd_mamba_ssm(
    x_BLHP: Tensor,
    delta_BLH: Tensor,
    a_H: Tensor,
    b_BLGN: Tensor,
    c_BLGN: Tensor,
    d_H: Tensor | None,
    initial_BHNP: Tensor | None,
    *,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Run ``mamba_chunk_scan_combined``, whose states are (B, H, P, N), and return (y, final state)."""
    initial = None if initial_BHNP is None else initial_BHNP.mT.contiguous()
    with torch.autocast(x_BLHP.device.type, enabled=False):
        y, state = mamba_chunk_scan_combined(
            *(t.contiguous() for t in (x_BLHP, delta_BLH, a_H, b_BLGN, c_BLGN)),
            chunk_size,
            D=d_H,
            initial_states=initial,
            return_final_states=True,
        )
    return y, state.mT
