"""Pictures of depthwise filters: the filters, their covariance, its leading eigenvectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from espalier.init.filter_fit import pooled_covariance
from espalier.init.layouts import DepthwiseWeights
from espalier.report.raster import Panel, Row, mosaic, picture_table, shrink
from espalier.report.section import Markup, Section
from espalier.report.views import LAYERS, View, layers_of, left_out, spread

_FILTERS, _EIGEN_FILTERS, _ACROSS = 36, 8, 4
_PIXELS = 225


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
    found = [(view, layers) for view in views if (layers := layers_of(view, DepthwiseWeights))]
    if not found:
        return None
    layers = found[0][1]
    shown = spread(len(layers), LAYERS)
    words = left_out(len(layers), LAYERS, "layers")
    parts = []
    for draw, caption, columns in (
        (_filters_panel, f"The first {_FILTERS} filters of every layer{words}.", "filters"),
        (
            _covariance_panel,
            f"Covariance of the filters' taps (k² × k², taps in row-major order){words}: bands beside the diagonal say "
            "that neighbouring taps rise and fall together; an empty picture but for the diagonal is white noise.",
            "covariance",
        ),
        (
            _eigen_panel,
            f"The {_EIGEN_FILTERS} leading eigenvectors of that covariance, as filters{words}: smooth ones, the "
            "first without a change of sign, say that the filters vary smoothly; hover for shares of the variance.",
            "eigen-filters",
        ),
    ):
        rows = [Row(view.label, [[draw(*mine[index])] for index in shown]) for view, mine in found]
        headings = [f"{layers[index][0]} {columns}" for index in shown]
        parts.append(picture_table(headings, rows, scale="diverging", shared=False, width=600, caption=caption))
    return Section("Depthwise filters", tuple[Markup, ...](parts))


def _filters_panel(name: str, weights: DepthwiseWeights) -> Panel:
    return Panel(_tiles(weights.weight[:_FILTERS, 0].float(), weights, 6), f"{name}: filters")


def _covariance_panel(name: str, weights: DepthwiseWeights) -> Panel:
    covariance_KK, _ = pooled_covariance([weights.weight.flatten(1)])
    words = f"{name}: covariance of {len(weights.weight)} filters"
    return Panel(shrink(covariance_KK, _PIXELS), words)


def _eigen_panel(name: str, weights: DepthwiseWeights) -> Panel:
    covariance_KK, _ = pooled_covariance([weights.weight.flatten(1)])
    filters_NK, shares_N = eigen_filters(covariance_KK)
    shares = " ".join(f"{share:.0%}" for share in shares_N.tolist())
    return Panel(_tiles(filters_NK, weights, _ACROSS), f"{name}: shares of the variance {shares}")


def _tiles(filters_NK: Tensor, weights: DepthwiseWeights, columns: int) -> Tensor:
    # One axis becomes a line of pixels, three axes become slices side by side.
    kernel = weights.weight.shape[2:]
    height = kernel[0] if len(kernel) > 1 else 1
    return mosaic(filters_NK.reshape(len(filters_NK), height, -1), columns)
