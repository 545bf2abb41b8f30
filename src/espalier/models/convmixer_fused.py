"""ConvMixer for inference: its batch norms folded as far as that is exact."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from espalier.models.convmixer import ConvMixer

# Note [What folds]
# In evaluation mode a batch norm is u ↦ s·u + t, channel by channel. It comes after the activation here, so it can only
# go into what follows.
# - The norm after the depthwise convolution is followed by the residual sum and the pointwise convolution W, c alone:
#   W(x + s·u + t) + c = W(x + s·u) + (W t + c). The shift moves into the bias; the scale stays, inside the sum.
# - The norm after the pointwise convolution (and that of the stem) is followed by a depthwise convolution that pads
#   with zeros. Padding is not s·u + t of anything the convolution sees, so a shift moved into its bias would be wrong
#   at every border, by t times the taps that fall outside. The scale could move, but the residual sum needs it too.
#   Both stay.


class Affine(nn.Module):
    """``s·x + t``, channel by channel: a batch norm in evaluation mode, in one pass.

    Args:
        norm: the batch norm, with running statistics.
        axes: how many axes follow the channels.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: Any, axes: int) -> None:
        super().__init__()
        scale, shift = affine_of(norm)
        shape = (-1, *(1,) * axes)
        self.register_buffer("scale", scale.to(norm.weight.dtype).view(shape))
        self.register_buffer("shift", shift.to(norm.weight.dtype).view(shape))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, h, *size) to the same shape."""
        return torch.addcmul(self.shift, x, self.scale)


class FusedBlock(nn.Module):
    """``z = A(act(W(x + s·act(DW(x))) + c′))`` with the depthwise norm's shift in c′ (Note [What folds])."""

    scale: Tensor

    def __init__(self, block: Any, axes: int) -> None:
        super().__init__()
        self.mix, self.act, norm = block[0].fn
        self.point, self.norm = block[1], Affine(block[3], axes)
        scale, shift = affine_of(norm)
        self.register_buffer("scale", scale.to(norm.weight.dtype).view(-1, *(1,) * axes))
        bias = self.point.bias.double() + self.point.weight.flatten(1).double() @ shift
        self.point.bias.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, h, *size) to the same shape."""
        return self.norm(self.act(self.point(torch.addcmul(x, self.act(self.mix(x)), self.scale))))


class FusedConvMixer(nn.Module):
    """What ``fuse`` returns: maps and logits of its model in evaluation mode, with one pass over memory a block less.

    Its weights take no gradients; its inputs do.
    """

    def __init__(self, model: ConvMixer) -> None:
        super().__init__()
        axes = model.spatial_dims
        conv, act, norm = model.stem
        self.stem = nn.Sequential(conv, act, Affine(norm, axes))
        self.blocks = nn.Sequential(*(FusedBlock(block, axes) for block in model.blocks))
        self.global_pool, self.head = model.global_pool, model.head

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the feature map (B, h, *size/p)."""
        return self.blocks(self.stem(x))

    def forward(self, x: Tensor) -> Tensor:
        """Classify images: (B, C, *size) to logits (B, classes)."""
        x = self.forward_features(x)
        return self.head(x.flatten(2).mean(-1) if self.global_pool else x)


@torch.no_grad()
def fuse(model: ConvMixer) -> FusedConvMixer:
    """Return a copy of a trained ConvMixer for inference, its batch norms folded where that is exact.

    The folded numbers are computed in float64 and rounded once. Outputs differ from the model's by rounding only.

    Args:
        model: left as it is.
    """
    return FusedConvMixer(copy.deepcopy(model)).requires_grad_(False).eval()


def affine_of(norm: Any) -> tuple[Tensor, Tensor]:
    """Return scale and shift of a batch norm in evaluation mode: ``s = γ/√(σ² + ε)``, ``t = β − s·μ``, float64."""
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale, norm.bias.double() - scale * norm.running_mean.double()
