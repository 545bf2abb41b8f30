"""Pictures of depthwise filters: the filters, their covariance, its leading eigenvectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from espalier.init.filters.fit import pooled_covariance
from espalier.init.layouts import DepthwiseWeights
from espalier.report.raster import Panel, Row, mosaic, picture_table, shrink
from espalier.report.section import Section
from espalier.report.views import View, layer_pictures, layers_of, runs_behind

_FILTERS, _EIGEN_FILTERS, _ACROSS = 36, 12, 6
# Up to 15 × 15 taps in full.
_SIDE = 225


def eigen_filters(covariance_KK: Tensor, count: int = _EIGEN_FILTERS) -> tuple[Tensor, Tensor]:
    """Return the leading eigenvectors of a covariance and their shares of the variance.

    Returns:
        Filters (n, K) of norm 1 whose largest entry is positive, and shares (n,), falling.
    """
    values_K, vectors_KK = torch.linalg.eigh(covariance_KK)
    leading_NK = vectors_KK.flip(1)[:, :count].mT
    largest_N1 = leading_NK.gather(1, leading_NK.abs().argmax(1, keepdim=True))
    values_K = values_K.flip(0).clamp_min(0)
    return leading_NK * largest_N1.sign(), values_K[:count] / values_K.sum().clamp_min(torch.finfo(values_K.dtype).tiny)


@torch.no_grad()
def depthwise_filters(views: Sequence[View]) -> Section | None:
    """Draw filters, covariance and eigen-filters of every network that has depthwise convolutions."""
    found = layers_of(views, DepthwiseWeights)
    if not found:
        return None
    if len(found) == 1:
        rows = [Row(name, [draw(name, weights) for _, draw, _ in _KINDS]) for name, weights in found[0][1]]
        caption = " ".join(f"{title}: {text}" for title, _, text in _KINDS) + runs_behind(found)
        titles = [title for title, _, _ in _KINDS]
        tables = [picture_table("", titles, rows, scale="diverging", shared=False, caption=caption)]
    else:
        tables = [layer_pictures(title, found, draw, text) for title, draw, text in _KINDS]
    return Section("Depthwise filters", tuple(tables))


def _filter_panels(name: str, weights: DepthwiseWeights) -> list[Panel]:
    return [Panel(_tiles(weights.weight[:_FILTERS, 0].float(), weights), f"{name}: filters")]


def _covariance_panels(name: str, weights: DepthwiseWeights) -> list[Panel]:
    covariance_KK, _ = pooled_covariance([weights.weight.flatten(1)])
    return [Panel(shrink(covariance_KK, _SIDE), f"{name}: covariance over {len(weights.weight)} filters")]


def _eigen_panels(name: str, weights: DepthwiseWeights) -> list[Panel]:
    covariance_KK, _ = pooled_covariance([weights.weight.flatten(1)])
    filters_NK, shares_N = eigen_filters(covariance_KK)
    shares = ", ".join(f"{share:.0%}" for share in shares_N.tolist())
    return [Panel(_tiles(filters_NK, weights), f"{name}: shares of the variance {shares}")]


def _tiles(filters_NK: Tensor, weights: DepthwiseWeights) -> Tensor:
    # One axis becomes a line of pixels, three axes become slices side by side.
    kernel = weights.weight.shape[2:]
    height = kernel[0] if len(kernel) > 1 else 1
    return mosaic(filters_NK.reshape(len(filters_NK), height, -1), _ACROSS)


_KINDS: tuple[tuple[str, Callable[[str, DepthwiseWeights], Sequence[Panel]], str], ...] = (
    ("The filters", _filter_panels, f"Up to {_FILTERS} filters a layer, in the order of its channels."),
    (
        "Covariance of the taps",
        _covariance_panels,
        "Tap against tap, in row-major order, so that rows of a filter make blocks: bands and blocks beside the "
        "diagonal say that neighbouring taps rise and fall together; a diagonal alone is white noise.",
    ),
    (
        "Its leading eigenvectors",
        _eigen_panels,
        f"Up to {_EIGEN_FILTERS}, as filters, row by row: smooth ones say that filters vary smoothly. "
        "Hover for their shares of the variance.",
    ),
)
