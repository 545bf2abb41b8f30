"""The compiled gated norm as a torch operator; see ``cpu``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from espalier.nn.kernels import formulas
from espalier.nn.kernels.arguments import NORM_BACKWARD, NORM_FORWARD
from espalier.nn.kernels.cpu import WORK_ITEMS, contiguous, register_gradients, rows
from espalier.nn.kernels.library import call


def _inputs(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> dict[str, Any]:
    """Return what both passes need by the kernel's names."""
    y, weight = contiguous(y, weight)
    z = rows(z.reshape(math.prod(z.shape[:-2]), *z.shape[-2:]))
    count = z.shape[0] * z.shape[1]
    sizes = {"rows": count, "groups": groups, "width": z.shape[2] // groups, "stride": z.stride(1)}
    return {"y": y, "z": z, "weight": weight, "eps": eps, **sizes, "items": min(count, WORK_ITEMS)}


@torch.library.custom_op("espalier::gated_norm", mutates_args=())
def gated_norm_cpu(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """Return ``weight · v / √(mean(v²) + eps)``, v = y · SiLU(z), the mean over each group of the last dimension."""
    out = y.new_empty(y.shape)
    call(NORM_FORWARD, y.dtype, out=out, **_inputs(y, z, weight, groups, eps))
    return out


@gated_norm_cpu.register_fake
def _(y: Tensor, *_: Any) -> Tensor:
    return y.new_empty(y.shape)


@torch.library.custom_op("espalier::gated_norm_backward", mutates_args=())
def gated_norm_backward_cpu(
    y: Tensor, z: Tensor, weight: Tensor, dout: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of (y, z, weight)."""
    inputs = _inputs(y, z, weight, groups, eps)
    dy, dz, dweight = y.new_empty(y.shape), y.new_empty(y.shape), y.new_zeros(inputs["items"], y.shape[-1])
    call(NORM_BACKWARD, y.dtype, dout=dout.contiguous(), dy=dy, dz=dz, dweight=dweight, **inputs)
    return dy, dz, dweight.sum(0)


@gated_norm_backward_cpu.register_fake
def _(y: Tensor, z: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return y.new_empty(y.shape), y.new_empty(y.shape), weight.new_empty(weight.shape)


register_gradients(
    gated_norm_cpu,
    lambda given, _, grads, numbers: gated_norm_backward_cpu(*given, *grads, *numbers),
    formulas.gated_norm,
    tensors=3,
)
