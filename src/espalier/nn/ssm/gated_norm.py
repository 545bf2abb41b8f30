"""The gated RMS normalisation at the end of a Mamba-2 mixer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.errors import EspalierError
from espalier.nn.kernels import formulas
from espalier.nn.kernels.backend import choose
from espalier.nn.precision import outside_graphs, upcast, without_autocast
from espalier.sizes import whole_numbers


class GatedRMSNorm(nn.Module):
    """``weight · v / √(mean(v²) + eps)`` with v = y · SiLU(z), the mean over each group of channels.

    Args:
        dim: channels.
        groups: of channels, each with a mean of its own.
        eps: added to the mean.

    Shapes: y and z (…, dim), broadcast to one shape.

    Raises:
        EspalierError: sizes that are not whole numbers from 1, groups that do not divide the channels; on the inputs,
            other channels, shapes that do not broadcast, two devices, or numbers that are not real floating-point
            ones.
    """

    def __init__(self, dim: int, groups: int = 1, eps: float = 1e-5) -> None:
        super().__init__()
        dim, groups = whole_numbers(dim=dim, groups=groups)
        if dim % groups:
            raise EspalierError(f"{dim} channels do not fall into {groups} groups: make dim a multiple of groups")
        self.weight = nn.Parameter(torch.ones(dim))
        self.groups, self.eps = groups, eps

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """Normalise y gated by z in float32 or better, and return it in the dtype of y.

        Only the inputs are kept for the backward pass, which computes the rest again.
        """
        dtype, width = y.dtype, len(self.weight)
        if not y.ndim or not z.ndim or y.shape[-1] != width or z.shape[-1] != width:
            raise EspalierError(f"y is {tuple(y.shape)} and z {tuple(z.shape)}: give both {width} channels, last")
        if not y.device == z.device == self.weight.device:
            raise EspalierError(
                f"y is on {y.device}, z on {z.device}, the weight on {self.weight.device}: use one device"
            )
        y, z, weight = upcast(y, z, self.weight)
        if y.shape != z.shape:
            try:
                y, z = torch.broadcast_tensors(y, z)
            except RuntimeError as error:
                raise EspalierError(f"y is {tuple(y.shape)} and z {tuple(z.shape)}: they do not broadcast") from error
        if (name := choose("gated_norm", y.device.type)) == "formula":
            return formulas.gated_norm(y, z, weight, self.groups, self.eps).to(dtype)
        if name == "compiled" and y.ndim > 1:
            from espalier.nn.kernels.gated_norm import gated_norm_cpu

            return gated_norm_cpu(y, z, weight, self.groups, self.eps).to(dtype)
        return _apply_gatednorm(y, z, weight, self.groups, self.eps).to(dtype)


def _gate(y: Tensor, z: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Return v = y · SiLU(z) by groups, (…, G, E/G), and 1/√(mean(v²) + eps), (…, G, 1)."""
    gated = (F.silu(z) * y).unflatten(-1, (groups, -1))
    return gated, gated.square().mean(-1, keepdim=True).add_(eps).rsqrt_()


class _GatedNorm(torch.autograd.Function):
    """The normalisation in plain torch, with a backward pass by hand."""

    @staticmethod
    @without_autocast
    def forward(ctx: Any, y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
        ctx.save_for_backward(y, z, weight)
        ctx.groups, ctx.eps = groups, eps
        gated, scale = _gate(y, z, groups, eps)
        return gated.mul_(scale).flatten(-2) * weight  # a new tensor: see ``outside_graphs``

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        y, z, weight = ctx.saved_tensors
        if formulas.by_formula():
            given, eps = (y, z, weight), ctx.eps  # checkpointing hands each saved tensor out a single time
            found = formulas.differentiate(
                lambda y, z, w: formulas.gated_norm(y, z, w, ctx.groups, eps), given, (dout,)
            )
            return (*found, None, None)
        gated, scale = _gate(y, z, ctx.groups, ctx.eps)
        grad = dout.unflatten(-1, (ctx.groups, -1))
        dweight = (grad * gated).mul_(scale).reshape(-1, len(weight)).sum(0)  # of one row, too
        grad = grad * weight.view(ctx.groups, -1)
        shift = (grad * gated).mean(-1, keepdim=True) * scale.pow(3)
        dgated = grad.mul_(scale).addcmul_(shift, gated, value=-1).flatten(-2)
        return dgated * F.silu(z), torch.ops.aten.silu_backward(dgated * y, z), dweight, None, None


# Wrapped once, here: a compiler that meets the call cannot trace the wrapping.
_apply_gatednorm = outside_graphs(_GatedNorm.apply)
