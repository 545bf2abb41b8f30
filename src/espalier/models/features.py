"""A model as a backbone: the feature maps of some of its blocks, with their channels and reductions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from espalier.errors import EspalierError


def block_indices(count: int, indices: int | Sequence[int] | None) -> list[int]:
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


@dataclass(frozen=True)
class FeatureInfo:
    """What a backbone returns, with the accessors that detection and segmentation heads ask timm's models for."""

    info: Sequence[dict[str, Any]]
    """One entry a block: ``num_chs``, ``reduction``, ``module``."""
    out_indices: Sequence[int]
    """The blocks whose maps are returned."""

    def channels(self) -> list[int]:
        """Return the channels of each map."""
        return self.get("num_chs")

    def reduction(self) -> list[int]:
        """Return how many input pixels go on one pixel of each map, along an axis."""
        return self.get("reduction")

    def module_name(self) -> list[str]:
        """Return the module that each map comes from."""
        return self.get("module")

    def get(self, key: str) -> list[Any]:
        """Return one property of each map."""
        return [self.info[index][key] for index in self.out_indices]


class FeatureNet(nn.Module):
    """The feature maps of some blocks of a model, shallow to deep; its head and the blocks after them are removed.

    ``feature_info`` tells their channels and reductions. A ConvMixer works at one resolution, so all its maps have the
    same ones.

    Args:
        model: a model with ``feature_info``, ``forward_intermediates`` and ``prune_intermediate_layers``; it is taken
            over, not copied.
        out_indices: blocks; a number n means the last n, negative ones count from the end.

    Raises:
        EspalierError: a model without these methods, or no such block.
    """

    def __init__(self, model: nn.Module, out_indices: int | Sequence[int] = 1) -> None:
        super().__init__()
        prune = getattr(model, "prune_intermediate_layers", None)
        if prune is None:
            raise EspalierError(f"model {type(model).__name__} gives no feature maps: choose a ConvMixer")
        self.out_indices = sorted(prune(out_indices))
        self.model = model
        info: Any = model.feature_info
        self.feature_info = FeatureInfo(info, self.out_indices)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map images (B, C, *size) to feature maps, each (B, channels, *size/reduction)."""
        forward: Any = self.model.forward_intermediates
        return forward(x, indices=self.out_indices, intermediates_only=True)
