"""The compiled gated norm as a torch operator; see ``cpu``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from espalier.nn.kernels import formulas
from espalier.nn.kernels.arguments import NORM_BACKWARD, NORM_FORWARD
from espalier.nn.kernels.cpu import WORK_ITEMS, rows
from espalier.nn.kernels.library import call


def _shape(z: Tensor, groups: int) -> dict[str, int]:
    count = z.shape[0] * z.shape[1]
    return {
        "rows": count,
        "groups": groups,
        "width": z.shape[2] // groups,
        "stride": z.stride(1),
        "items": min(count, WORK_ITEMS),
    }


def _flat(tensor: Tensor) -> Tensor:
    return rows(tensor.reshape(-1, *tensor.shape[-2:]) if tensor.ndim > 2 else tensor[None])


@torch.library.custom_op("espalier::gated_norm", mutates_args=())
def gated_norm_cpu(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """Return ``weight · v / √(mean(v²) + eps)``, v = y · SiLU(z), the mean over each group of the last dimension."""
    y, z = y.contiguous(), _flat(z)
    out = torch.empty_like(y)
    call(NORM_FORWARD, y.dtype, y=y, z=z, weight=weight.contiguous(), out=out, eps=eps, **_shape(z, groups))
    return out


@gated_norm_cpu.register_fake
def _(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    return y.new_empty(y.shape)


@torch.library.custom_op("espalier::gated_norm_backward", mutates_args=())
def gated_norm_backward_cpu(
    y: Tensor, z: Tensor, weight: Tensor, dout: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of (y, z, weight)."""
    y, z, weight, dout = y.contiguous(), _flat(z), weight.contiguous(), dout.contiguous()
    shape = _shape(z, groups)
    dy, dz, dweight = torch.empty_like(y), torch.empty_like(y), y.new_zeros(shape["items"], y.shape[-1])
    inputs = {"y": y, "z": z, "weight": weight, "dout": dout}
    call(NORM_BACKWARD, y.dtype, **inputs, eps=eps, dy=dy, dz=dz, dweight=dweight, **shape)
    return dy, dz, dweight.sum(0)


@gated_norm_backward_cpu.register_fake
def _(y: Tensor, z: Tensor, weight: Tensor, dout: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return y.new_empty(y.shape), y.new_empty(y.shape), weight.new_empty(weight.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.groups, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    if formulas.by_formula():
        found = formulas.differentiate(
            lambda y, z, weight: formulas.gated_norm(y, z, weight, ctx.groups, ctx.eps), ctx.saved_tensors, (dout,)
        )
        return (*found, None, None)
    return *gated_norm_backward_cpu(*ctx.saved_tensors, dout, ctx.groups, ctx.eps), None, None


gated_norm_cpu.register_autograd(_backward, setup_context=_setup)
