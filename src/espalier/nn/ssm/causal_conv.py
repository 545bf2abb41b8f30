"""The short causal depthwise convolution with SiLU in front of both Mamba recurrences, channel-last."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from espalier.nn.kernels.backend import choose
from espalier.nn.precision import outside_graphs, upcast, without_autocast


def causal_conv_silu(
    x_BLC: Tensor, weight_CK: Tensor, bias_C: Tensor | None = None, *, history: Tensor | None = None
) -> Tensor:
    """Return ``SiLU(bias + Σ_k weight[:, k] · x_{t−K+1+k})`` per channel: the newest tap is the last one.

    Nothing but the inputs is kept for the backward pass, which computes the convolution again.

    Args:
        x_BLC: inputs, (batch, length, channels).
        weight_CK: taps, (channels, kernel size K).
        bias_C: one number a channel.
        history: the K − 1 inputs before the first, (B, K − 1, C); zeros if none are given.
    """
    dtype = x_BLC.dtype
    x, weight, bias = upcast(x_BLC, weight_CK, bias_C)
    if history is not None:
        x = torch.cat([history.to(x.dtype), x], dim=1)
    if choose("causal_conv", x.device.type) == "compiled":
        from espalier.nn.kernels.cpu import causal_conv_silu_cpu

        y = causal_conv_silu_cpu(x, weight, bias)
    else:
        y = _apply_shifted(x, weight, bias)
    return (y if history is None else y[:, history.shape[1] :]).to(dtype)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Add up shifted copies: conv1d on a CPU transposes twice and is slower for a handful of taps."""
    taps = weight.shape[1]
    y = x * weight[:, -1] if bias is None else torch.addcmul(bias, x, weight[:, -1])
    for back in range(1, min(taps, x.shape[1])):
        y[:, back:].addcmul_(x[:, :-back], weight[:, taps - 1 - back])
    return y


class _Shifted(torch.autograd.Function):
    """The convolution and SiLU in plain torch."""

    @staticmethod
    @without_autocast
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return F.silu(_convolve(x, weight, bias))  # a new tensor: see ``outside_graphs``

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        taps = weight.shape[1]
        dpre = torch.ops.aten.silu_backward(dy, _convolve(x, weight, bias))
        dx, dweight = dpre * weight[:, -1], torch.zeros_like(weight)
        dweight[:, -1] = (dpre * x).sum((0, 1))
        for back in range(1, min(taps, x.shape[1])):
            dx[:, :-back].addcmul_(dpre[:, back:], weight[:, taps - 1 - back])
            dweight[:, taps - 1 - back] = (dpre[:, back:] * x[:, :-back]).sum((0, 1))
        return dx, dweight, None if bias is None else dpre.sum((0, 1))


# Wrapped once, here: a compiler that meets the call cannot trace the wrapping.
_apply_shifted = outside_graphs(_Shifted.apply)
