"""Pictures of attention: the products of its weights, and where the tokens of one image look."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from espalier.errors import EspalierError
from espalier.init.layouts import AttentionWeights
from espalier.models import VisionTransformer
from espalier.report.products import SIDE, product_panel
from espalier.report.raster import Panel, photograph, picture_table, shrink
from espalier.report.section import Section, paragraph
from espalier.report.views import HEADS, LAYERS, View, lay_out, layers_of, left_out, runs_behind, spread

# Pixels of all pictures of one kind together: a page holds a few megabytes.
_PIXELS = 1_500_000


def query_key_factors(weights: AttentionWeights, head: int) -> tuple[Tensor, Tensor]:
    """Return the factors of ``W_Q W_Kᵀ = leftᵀ right`` of one query head, (k, d) each, in float32."""
    heads, groups, dim = weights.num_heads, weights.num_kv_heads, weights.q.shape[-1]
    q_HKD, k_GKD = weights.q.reshape(heads, -1, dim), weights.k.reshape(groups, -1, dim)
    return q_HKD[head].float(), k_GKD[head // (heads // groups)].float()


def value_output_factors(weights: AttentionWeights) -> tuple[Tensor, Tensor]:
    """Return the factors of ``Σ_h W_V,h W_proj,h = leftᵀ right``, (H·k, d) each, in float32."""
    groups, dim = weights.num_kv_heads, weights.v.shape[-1]
    v_GKD = weights.v.float().reshape(groups, -1, dim)
    v_HKD = v_GKD.repeat_interleave(weights.num_heads // groups, 0)
    return v_HKD.reshape(-1, dim), weights.out.float().mT


@torch.no_grad()
def attention_products(views: Sequence[View]) -> Section | None:
    """Draw the two products that mimetic initialisation shapes, for every network that has attention."""
    found = [(view, layers) for view in views if (layers := layers_of(view, AttentionWeights))]
    if not found:
        return None
    layers = found[0][1]
    heads, dim = layers[0][1].num_heads, layers[0][1].q.shape[-1]
    alone = len(found) == 1
    shown_heads = heads if alone else min(heads, HEADS)
    count = (len(layers) if alone else len(found) * min(len(layers), LAYERS)) * shown_heads
    side = max(32, min(SIDE, int((_PIXELS / count) ** 0.5)))

    def query_key(name: str, weights: AttentionWeights) -> list[Panel]:
        picked = spread(weights.num_heads, shown_heads)
        return [product_panel(f"{name} head {head}", *query_key_factors(weights, head), side) for head in picked]

    def value_output(name: str, weights: AttentionWeights) -> list[Panel]:
        return [product_panel(name, *value_output_factors(weights), side)]

    words = "" if alone else left_out(len(layers), LAYERS, "layers")
    words += f" A pixel is the mean over about {dim / side:.3g} × {dim / side:.3g} entries." if dim > side else ""
    words += runs_behind([view for view, _ in found])
    qk = picture_table(
        "W_Q W_Kᵀ of every head", *lay_out(found, query_key), scale="diverging", shared=True,
        caption="A red diagonal says that tokens look at tokens like themselves."
        f"{left_out(heads, shown_heads, 'heads')}{words}",
    )  # fmt: skip
    vo = picture_table(
        "W_V W_proj of every layer", *lay_out(found, value_output), scale="diverging", shared=True,
        caption=f"A blue diagonal says that a layer takes away part of what it looks at.{words}",
    )  # fmt: skip
    return Section("Products of attention weights", (qk, vo))


@torch.no_grad()
def attention_maps(views: Sequence[View]) -> Section | None:
    """Draw where the tokens of one test image look, for our own vision transformers."""
    nets = [(view, view.net) for view in views if isinstance(view.net, VisionTransformer)]
    run = next((view.run for view, _ in nets if view.run is not None), None)
    if run is None:
        return None
    try:
        source = run.source()
        image_1CHW = next(iter(source.eval_batches(source.eval_splits[0], 1)))[0]
    except (EspalierError, OSError) as error:
        return Section("Attention maps", (paragraph(f"No attention maps: {error}", "note"),))
    found = []
    for view, net in nets:
        maps = [(f"blocks.{index}", map_1HLL[0]) for index, map_1HLL in enumerate(net.attention_maps(image_1CHW))]
        found.append((view, maps))
    table = picture_table(
        "Attention of every head", *lay_out(found, _map_panels), scale="sequential", shared=True,
        caption="Row i of a panel shows where patch i of the image looks, and sums to one: a diagonal is a patch that "
        f"looks at itself, lines beside it are its neighbours.{left_out(len(found[0][1]), LAYERS, 'layers')}"
        f"{left_out(len(found[0][1][0][1]), HEADS, 'heads')}{runs_behind(views)}",
    )  # fmt: skip
    return Section("Attention maps", (photograph(image_1CHW[0], "The first image of the test set."), table))


def _map_panels(name: str, map_HLL: Tensor) -> list[Panel]:
    panels = []
    for head in spread(len(map_HLL), HEADS):
        own = float(map_HLL[head].diagonal().mean())
        panels.append(
            Panel(shrink(map_HLL[head], SIDE), f"{name} head {head}: {own:.0%} of a patch's look is at itself")
        )
    return panels
