"""The compiled gated norm as a torch operator; see ``cpu``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from espalier.nn.kernels.cpu import WORK_ITEMS, call, rows


def _shape(z: Tensor, groups: int) -> tuple[int, int, int, int, int]:
    count = z.shape[0] * z.shape[1]
    return count, groups, z.shape[2] // groups, z.stride(1), min(count, WORK_ITEMS)


def _flat(tensor: Tensor) -> Tensor:
    return rows(tensor.reshape(-1, *tensor.shape[-2:]) if tensor.ndim > 2 else tensor[None])


@torch.library.custom_op("espalier::gated_norm", mutates_args=())
def gated_norm_cpu(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """Return ``weight · v / √(mean(v²) + eps)``, v = y · SiLU(z), the mean over each group of the last dimension."""
    y, z = y.contiguous(), _flat(z)
    out = torch.empty_like(y)
    call("norm_forward", y.dtype, (y, z, weight.contiguous(), y.new_tensor(eps), out), _shape(z, groups))
    return out


@gated_norm_cpu.register_fake
def _(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    return y.new_empty(y.shape)


@torch.library.custom_op("espalier::gated_norm_backward", mutates_args=())
def gated_norm_backward_cpu(
    y: Tensor, z: Tensor, weight: Tensor, dout: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of (y, z, weight)."""
    y, z, dout = y.contiguous(), _flat(z), dout.contiguous()
    shape = _shape(z, groups)
    dy, dz, dweight = torch.empty_like(y), torch.empty_like(y), y.new_zeros(shape[-1], y.shape[-1])
    inputs = (y, z, weight.contiguous(), y.new_tensor(eps), dout)
    call("norm_backward", y.dtype, (*inputs, dy, dz, dweight), shape)
    return dy, dz, dweight.sum(0)


@gated_norm_backward_cpu.register_fake
def _(y: Tensor, z: Tensor, weight: Tensor, dout: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return y.new_empty(y.shape), y.new_empty(y.shape), weight.new_empty(weight.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.groups, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return *gated_norm_backward_cpu(*ctx.saved_tensors, dout, ctx.groups, ctx.eps), None, None


gated_norm_cpu.register_autograd(_backward, setup_context=_setup)
