"""ConvMixer: patches, then depthwise and pointwise convolutions at one resolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from espalier.errors import EspalierError, unknown_name

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}


class Residual(nn.Module):
    """``x + fn(x)``."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        """Add the function's value to its input."""
        return x + self.fn(x)


class ConvMixer(nn.Module):
    """ConvMixer-h/d: ``Conv(p, stride p) → GELU → BN``, then d × ``[x + BN(GELU(DW_k(x))); BN(GELU(Conv 1))]``.

    Takes images of any size. Even kernels are allowed: "same" padding puts the extra pixel last, so the centre tap is
    number (k − 1)//2 (0-based).

    Args:
        dim: h, the width.
        depth: d, the number of blocks.
        kernel_size: k of the depthwise convolutions, at least 2.
        patch_size: p, side of a patch in pixels.
        in_chans: channels of the images.
        num_classes: classes; 0 leaves the head out.
        activation: ``"gelu"``, or ``"relu"`` as in ConvMixer-768/32.
        spatial_dims: 1, 2 or 3 axes.

    Raises:
        EspalierError: a kernel below 2, or unknown options.

    Source: arXiv 2201.09792, section 2.
    """

    def __init__(
        self,
        dim: int = 256,
        depth: int = 8,
        kernel_size: int = 9,
        patch_size: int = 7,
        in_chans: int = 3,
        num_classes: int = 1000,
        activation: str = "gelu",
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()
        if kernel_size < 2:
            raise EspalierError(f"kernel_size {kernel_size} mixes no pixels: choose at least 2")
        if activation not in ACTIVATIONS:
            raise unknown_name("activation", activation, ACTIVATIONS)
        if spatial_dims not in CONVOLUTIONS:
            raise EspalierError(f"spatial_dims {spatial_dims} is not supported: choose 1, 2 or 3")
        conv, norm, act = CONVOLUTIONS[spatial_dims], NORMS[spatial_dims], ACTIVATIONS[activation]
        self.num_classes, self.num_features, self.embed_dim = num_classes, dim, dim
        self.patch_size, self.spatial_dims, self.grad_checkpointing = patch_size, spatial_dims, False
        self.stem = nn.Sequential(conv(in_chans, dim, patch_size, patch_size), act(), norm(dim))
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    Residual(nn.Sequential(conv(dim, dim, kernel_size, groups=dim, padding="same"), act(), norm(dim))),
                    conv(dim, dim, 1),
                    act(),
                    norm(dim),
                )
                for _ in range(depth)
            )
        )
        self.head: nn.Module = nn.Linear(dim, num_classes) if num_classes else nn.Identity()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw every parameter and reset every buffer; callable again, also after ``to_empty()``.

        | parameter | distribution |
        |---|---|
        | weights and biases of convolutions and of the head | uniform on ±1/√fan_in (torch's default) |
        | batch norms | 1 and 0; running mean 0 and variance 1 |
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
                bound = module.weight[0].numel() ** -0.5
                for parameter in (module.weight, module.bias):
                    if parameter is not None:
                        nn.init.uniform_(parameter, -bound, bound, generator=generator)
            elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
                module.reset_parameters()

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the feature map (B, h, *size/p)."""
        x = self.stem(x)
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool the map and classify: to (B, classes), or (B, h) with ``pre_logits``."""
        pooled = x.flatten(2).mean(-1)
        return pooled if pre_logits else self.head(pooled)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images: (B, C, *size) to logits (B, classes)."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """Return the head."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a fresh one for ``num_classes`` classes; 0 removes it."""
        self.num_classes = num_classes
        like = self.stem[0].weight
        assert isinstance(like, Tensor)
        self.head = nn.Linear(self.num_features, num_classes).to(like) if num_classes else nn.Identity()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass to save memory."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's patterns that group parameters by layer."""
        return {"stem": r"^stem", "blocks": r"^blocks\.(\d+)"}

    def no_weight_decay(self) -> set[str]:
        """Return the parameters exempt from weight decay: none, as in the published recipe."""
        return set()
