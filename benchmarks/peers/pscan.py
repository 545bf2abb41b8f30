"""The parallel scan of mamba.py: up-sweep and down-sweep of Blelloch type, in place, reversed for the gradients.

Every one of the 2·log₂ L sweeps is a handful of calls over strided views of the (B, E, L, N) decays and states, which
are all kept. Source of the formula: G. Blelloch, Prefix sums and their applications, 1990.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def _combine(decay: Tensor, state: Tensor, early: Any, late: Any) -> None:
    """Let the later element take in the earlier one: x_late += a_late · x_early, a_late *= a_early."""
    state[late].add_(decay[late] * state[early])
    decay[late].mul_(decay[early])


def sweep_(decay_BELN: Tensor, state_BELN: Tensor) -> None:
    """Turn the inputs x_t into h_t = a_t h_{t−1} + x_t, in place; the length L is a power of 2."""
    length = decay_BELN.shape[2]
    every = slice(None)
    step = 1
    while step < length:
        _combine(
            decay_BELN,
            state_BELN,
            (every, every, slice(step - 1, None, 2 * step)),
            (every, every, slice(2 * step - 1, None, 2 * step)),
        )
        step *= 2
    step = length // 4
    while step:
        count = length // (2 * step) - 1
        early = slice(2 * step - 1, 2 * step * count, 2 * step)
        late = slice(3 * step - 1, None, 2 * step)
        _combine(decay_BELN, state_BELN, (every, every, early), (every, every, late))
        step //= 2


def _prepare(tensor_BLEN: Tensor) -> Tensor:
    """Return a padded copy in the layout (B, E, L, N)."""
    length = tensor_BLEN.shape[1]
    power = 1 << (length - 1).bit_length()
    return F.pad(tensor_BLEN, (0, 0, 0, 0, 0, power - length)).transpose(1, 2).clone()


class PScan(torch.autograd.Function):
    """h_t = a_t h_{t−1} + x_t for (B, L, E, N) decays and inputs."""

    @staticmethod
    def forward(ctx: Any, decay_BLEN: Tensor, x_BLEN: Tensor) -> Tensor:
        length = x_BLEN.shape[1]
        decay, state = _prepare(decay_BLEN), _prepare(x_BLEN)
        sweep_(decay, state)
        state = state[:, :, :length]
        ctx.save_for_backward(decay_BLEN, state)
        return state.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad_BLEN: Tensor) -> tuple[Tensor, Tensor]:
        decay_BLEN, state = ctx.saved_tensors
        length = grad_BLEN.shape[1]
        # The gradient obeys the same recurrence with time reversed: g_t = dh_t + a_{t+1} g_{t+1}.
        late = F.pad(decay_BLEN[:, 1:], (0, 0, 0, 0, 0, 1))
        decay, grad = _prepare(late.flip(1)), _prepare(grad_BLEN.flip(1))
        sweep_(decay, grad)
        grad = grad[:, :, :length].flip(2)
        d_decay = torch.zeros_like(state)
        d_decay[:, :, 1:] += state[:, :, :-1] * grad[:, :, 1:]
        return d_decay.transpose(1, 2), grad.transpose(1, 2)


def pscan(decay_BLEN: Tensor, x_BLEN: Tensor) -> Tensor:
    """Return all states h_t = a_t h_{t−1} + x_t."""
    return PScan.apply(decay_BLEN, x_BLEN)


def selective_scan_parallel(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Run the Mamba-1 recurrence as mamba.py does: all decays and inputs at once, then the parallel scan."""
    decay_BLEN = torch.exp(delta[..., None] * a)
    input_BLEN = (delta[..., None] * b[:, :, None]) * x[..., None]
    states_BLEN = pscan(decay_BLEN, input_BLEN)
    return (states_BLEN @ c[..., None]).squeeze(3) + d * x
