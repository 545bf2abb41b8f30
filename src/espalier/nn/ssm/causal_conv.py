"""The short causal depthwise convolution with SiLU in front of both Mamba recurrences, channel-last."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from espalier.errors import EspalierError
from espalier.nn.kernels import formulas
from espalier.nn.kernels.backend import choose
from espalier.nn.precision import outside_graphs, upcast, without_autocast
from espalier.nn.ssm.optional_inputs import check_devices


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

    Raises:
        EspalierError: shapes or devices that do not fit together, or numbers that are not real floating-point ones.
    """
    _check(x_BLC, weight_CK, bias_C, history)
    dtype = x_BLC.dtype
    x, weight, bias, history = upcast(x_BLC, weight_CK, bias_C, history)
    if history is not None:
        x = torch.cat([history, x], dim=1)
    if (name := choose("causal_conv", x.device.type)) == "formula":
        y = formulas.causal_conv_silu(x, weight, bias)
    elif name == "compiled":
        from espalier.nn.kernels.cpu import causal_conv_silu_cpu

        y = causal_conv_silu_cpu(x, weight, bias)
    else:
        y = _apply_shifted(x, weight, bias)
    return (y if history is None else y[:, history.shape[1] :]).to(dtype)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor | None) -> None:
    if x.ndim != 3 or weight.ndim != 2 or weight.shape[0] != x.shape[2] or not weight.shape[1]:
        raise EspalierError(f"x is {tuple(x.shape)} and weight {tuple(weight.shape)}: give (B, L, C) and (C, K)")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise EspalierError(f"bias is {tuple(bias.shape)}: give one number a channel, ({weight.shape[0]},)")
    if history is not None and (history.ndim != 3 or history.shape[::2] != x.shape[::2]):
        raise EspalierError(f"history is {tuple(history.shape)}: give it as (B, K − 1, C) beside x {tuple(x.shape)}")
    check_devices(x, weight, bias, history)


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
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        if formulas.by_formula():
            return tuple(formulas.differentiate(formulas.causal_conv_silu, (x, weight, bias), (dy,)))
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
