"""ConvMixer: patches, then depthwise and pointwise convolutions at one resolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from espalier.errors import EspalierError, unknown_name
from espalier.models.contract import TimmContract, draw_uniform, new_head
from espalier.models.hub import HubModel
from espalier.nn.depthwise import mixing_block, pointwise_block
from espalier.nn.plain import is_watched
from espalier.sizes import whole_numbers

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}
POOLS = ("avg", "")


class Residual(nn.Module):
    """``x + fn(x)``."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        """Add the function's value to its input."""
        return x + self.fn(x)


class Stem(nn.Sequential):
    """``BN(act(patches))``, as one kernel after the convolution where that can run."""

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, C, *size) to (B, h, *size/p)."""
        return pointwise_block(x, *self) if len(self) == 3 else super().forward(x)


class Block(nn.Sequential):
    """``x + BN(act(depthwise(x)))``, then ``BN(act(pointwise))``, by few kernels where those can run."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, h, *size) to the same shape."""
        mix, *point = self
        # Hooks on the containers between here and the convolution see their own inputs and outputs only if called.
        if len(point) != 3 or type(mix) is not Residual or type(mix.fn) is not nn.Sequential or len(mix.fn) != 3:
            return super().forward(x)
        if is_watched(mix) or is_watched(mix.fn):
            return super().forward(x)
        return pointwise_block(mixing_block(x, *mix.fn), *point)


class ConvMixer(TimmContract, HubModel):
    """ConvMixer-h/d: ``Conv(p, stride p) → GELU → BN``, then d × ``[x + BN(GELU(DW_k(x))); BN(GELU(Conv 1))]``.

    Takes images of any size. Even kernels are allowed: "same" padding puts the extra pixel last, so the centre tap is
    number (k − 1)//2 (0-based). Parameters bear the names that timm gives them.

    Args:
        dim: h, the width.
        depth: d, the number of blocks.
        kernel_size: k of the depthwise convolutions, at least 2.
        patch_size: p, side of a patch in pixels.
        in_chans: channels of the images.
        num_classes: classes; 0 leaves the head out.
        activation: ``"gelu"``, or ``"relu"`` as in ConvMixer-768/32.
        spatial_dims: 1, 2 or 3 axes.
        global_pool: ``"avg"``, or ``""`` to classify nothing and return the map.
        drop_rate: dropout before the head.

    Raises:
        EspalierError: a kernel below 2, another size that is no whole number from 1, or unknown options.

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
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        dim, depth, kernel_size, patch_size = whole_numbers(
            dim=dim, depth=depth, kernel_size=kernel_size, patch_size=patch_size
        )
        in_chans, spatial_dims = whole_numbers(in_chans=in_chans, spatial_dims=spatial_dims)
        if kernel_size < 2:
            raise EspalierError(f"kernel_size {kernel_size} mixes no pixels: choose at least 2")
        if activation not in ACTIVATIONS:
            raise unknown_name("activation", activation, ACTIVATIONS)
        if spatial_dims not in CONVOLUTIONS:
            raise EspalierError(f"spatial_dims {spatial_dims} is not supported: choose 1, 2 or 3")
        conv, norm, act = CONVOLUTIONS[spatial_dims], NORMS[spatial_dims], ACTIVATIONS[activation]
        self.num_features = self.embed_dim = self.head_hidden_size = dim
        self.in_chans, self.patch_size, self.spatial_dims = in_chans, patch_size, spatial_dims
        self.stem = Stem(conv(in_chans, dim, patch_size, patch_size), act(), norm(dim))
        self.blocks = nn.Sequential(
            *(
                Block(
                    Residual(nn.Sequential(conv(dim, dim, kernel_size, groups=dim, padding="same"), act(), norm(dim))),
                    conv(dim, dim, 1),
                    act(),
                    norm(dim),
                )
                for _ in range(depth)
            )
        )
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Channels, reduction and module of the map that each block returns, as timm lists them."""
        return [
            {"num_chs": self.num_features, "reduction": self.patch_size, "module": f"blocks.{index}"}
            for index in range(len(self.blocks))
        ]

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
                draw_uniform(module.weight, module.bias, generator)
            elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
                module.reset_parameters()

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return the last feature map and those of some blocks, or only the latter.

        Args:
            x: images (B, C, *size).
            indices: blocks; a number n means the last n, None all, negative ones count from the end.
            norm: timm's argument; there is no final norm to apply.
            stop_early: leave out the blocks after the last one asked for.
            output_fmt: ``"NCHW"``.
            intermediates_only: return the list alone.

        Raises:
            EspalierError: no such block, or another format.
        """
        if output_fmt != "NCHW":
            raise unknown_name("output_fmt", output_fmt, ["NCHW"])
        chosen = _block_indices(len(self.blocks), indices)
        maps, x = [], self.stem(x)
        for index, block in enumerate(self.blocks):
            if stop_early and index > max(chosen):
                break
            x = self.run_block(block, x)
            if index in chosen:
                maps.append(x)
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the blocks after the last of ``indices``, and the head; return the indices as positive numbers.

        Raises:
            EspalierError: no such block.
        """
        chosen = _block_indices(len(self.blocks), indices)
        self.blocks = nn.Sequential(*list(self.blocks)[: max(chosen) + 1])
        if prune_head:
            self.reset_classifier(0, "")
        return chosen

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the feature map (B, h, *size/p)."""
        features, _ = self.forward_intermediates(x, indices=1)
        return features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool the map and classify: to (B, classes), or (B, h) with ``pre_logits``; without pooling return the map."""
        # Channels go last for the mean, so that its gradient comes in the layout that the blocks need.
        pixels = tuple(range(1, 1 + self.spatial_dims))
        pooled = self.head_drop(x.movedim(1, -1).mean(pixels) if self.global_pool else x)
        return pooled if pre_logits or not self.global_pool else self.head(pooled)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images: (B, C, *size) to logits (B, classes)."""
        return self.forward_head(self.forward_features(x))

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a fresh one for ``num_classes`` classes (0 removes it), and the pooling if given.

        Raises:
            EspalierError: unknown pooling, or classes that are no whole number from 0.
        """
        if global_pool not in (None, *POOLS):
            raise unknown_name("global_pool", str(global_pool), POOLS)
        self.head = new_head(self, nn.Linear, self.num_features, num_classes)
        self.num_classes = int(num_classes)
        if global_pool is not None:
            self.global_pool = global_pool

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's patterns that group parameters by layer."""
        return {"stem": r"^stem", "blocks": r"^blocks\.(\d+)"}

    def no_weight_decay(self) -> set[str]:
        """Return the parameters exempt from weight decay: none, as in the published recipe."""
        return set()


def _block_indices(count: int, indices: int | Sequence[int] | None) -> list[int]:
    """Return which of ``count`` blocks are meant, in the order given, as numbers from 0.

    Args:
        count: number of blocks.
        indices: a number n for the last n, None for all, or indices, negative ones from the end.

    Raises:
        EspalierError: none is meant, or one that does not exist.
    """
    if indices is None or isinstance(indices, int):
        last = count if indices is None else indices
        if not 0 < last <= count:
            raise EspalierError(f"indices {indices}: choose between 1 and all {count} blocks")
        return list(range(count - last, count))
    if not indices or not all(-count <= index < count for index in indices):
        raise EspalierError(f"indices {list(indices)}: give some between {-count} and {count - 1}")
    return [index % count for index in indices]
