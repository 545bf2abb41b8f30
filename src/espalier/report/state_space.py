"""Pictures of state-space layers: the product of what writes to the state and what reads from it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from espalier.init.layouts.registry import SSMWeights
from espalier.report.products import SIDE, product_panel
from espalier.report.raster import Panel, picture_table
from espalier.report.section import Section
from espalier.report.views import HEADS, LAYERS, View, lay_out, layers_of, left_out, runs_behind, spread


@torch.no_grad()
def state_space_products(views: Sequence[View]) -> Section | None:
    """Draw ``W_Cᵀ W_B``, which mimetic initialisation correlates, for every network that has state-space layers."""
    found = [(view, layers) for view in views if (layers := layers_of(view, SSMWeights))]
    if not found:
        return None
    layers = found[0][1]
    width = layers[0][1].w_b.shape[1]
    words = "" if len(found) == 1 else left_out(len(layers), LAYERS, "layers")
    words += left_out(layers[0][1].groups, HEADS, "groups")
    words += f" A pixel is the mean over about {width / SIDE:.3g} × {width / SIDE:.3g} entries." if width > SIDE else ""
    words += runs_behind([view for view, _ in found])
    table = picture_table(
        "W_Cᵀ W_B of every layer", *lay_out(found, _panels), scale="diverging", shared=False,
        caption="A red diagonal says that a token reads from the state what tokens like itself wrote there; without "
        f"one, what is written and what is read have nothing to do with each other.{words}",
    )  # fmt: skip
    return Section("Products of state-space weights", (table,))


def _panels(name: str, weights: SSMWeights) -> list[Panel]:
    w_c_GND = weights.w_c.float().unflatten(0, (weights.groups, -1))
    w_b_GND = weights.w_b.float().unflatten(0, (weights.groups, -1))
    picked = spread(weights.groups, HEADS)
    return [product_panel(f"{name} group {group}", w_c_GND[group], w_b_GND[group], SIDE) for group in picked]
