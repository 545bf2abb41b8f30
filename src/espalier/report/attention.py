"""Pictures of attention: the products of its weights, and where the tokens of one image look."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from espalier.errors import EspalierError
from espalier.init.layouts import AttentionWeights
from espalier.models import VisionTransformer
from espalier.report.raster import Panel, Row, photograph, picture_table, shrink
from espalier.report.section import Section, paragraph
from espalier.report.views import HEADS, LAYERS, View, layers_of, left_out, spread

_PIXELS = 96


def query_key_product(weights: AttentionWeights, head: int) -> Tensor:
    """Return ``W_Q W_Kᵀ`` of one query head, (d, d) in float32: token x scores token y by x · A · yᵀ."""
    width = weights.q.shape[0] // weights.num_heads
    group = head // (weights.num_heads // weights.num_kv_heads)
    q_KD = weights.q[head * width : (head + 1) * width].float()
    k_KD = weights.k[group * width : (group + 1) * width].float()
    return q_KD.mT @ k_KD


def value_output_product(weights: AttentionWeights) -> Tensor:
    """Return ``Σ_h W_V,h W_proj,h``, (d, d) in float32: what a layer adds to a token that looks at itself alone."""
    groups, dim = weights.num_kv_heads, weights.v.shape[1]
    v_GKD = weights.v.float().reshape(groups, -1, dim)
    v_HKD = v_GKD.repeat_interleave(weights.num_heads // groups, 0)
    return v_HKD.reshape(-1, dim).mT @ weights.out.float().mT


@torch.no_grad()
def attention_products(views: Sequence[View]) -> Section | None:
    """Draw the two products that mimetic initialisation shapes, for every network that has attention."""
    found = [(view, layers) for view in views if (layers := layers_of(view, AttentionWeights))]
    if not found:
        return None
    layers = found[0][1]
    shown = spread(len(layers), LAYERS)
    columns = [layers[index][0] for index in shown]
    qk_rows = [Row(view.label, [_query_key_panels(*mine[index]) for index in shown]) for view, mine in found]
    vo_rows = [Row(view.label, [[_value_output_panel(*mine[index])] for index in shown]) for view, mine in found]
    layers_words = left_out(len(layers), LAYERS, "layers")
    heads_words = left_out(layers[0][1].num_heads, HEADS, "heads")
    dim = layers[0][1].q.shape[1]
    block = f" Pixels are means over blocks of about {dim / _PIXELS:.3g} × {dim / _PIXELS:.3g} entries." * (
        dim > _PIXELS
    )
    qk = picture_table(
        columns, qk_rows, scale="diverging", shared=True,
        caption=f"W_Q W_Kᵀ of every head{heads_words} of every layer{layers_words}: a red diagonal says that tokens "
        f"look at tokens like themselves.{block}",
    )  # fmt: skip
    vo = picture_table(
        columns, vo_rows, scale="diverging", shared=True, width=560,
        caption=f"W_V W_proj of every layer{layers_words}: a blue diagonal says that a layer takes away part of what "
        f"it looks at.{block}",
    )  # fmt: skip
    return Section("Products of attention weights", (qk, vo))


@torch.no_grad()
def attention_maps(views: Sequence[View]) -> Section | None:
    """Draw where the tokens of one test image look, for our own vision transformers."""
    found = [(view, view.net) for view in views if isinstance(view.net, VisionTransformer) and view.run is not None]
    if not found:
        return None
    run = found[0][0].run
    assert run is not None
    try:
        source = run.source()
        image_1CHW = next(iter(source.eval_batches(source.eval_splits[0], 1)))[0]
    except (EspalierError, OSError) as error:
        return Section("Attention maps", (paragraph(f"No attention maps: {error}", "note"),))
    rows, shown, depth = [], [], 0
    for view, net in found:
        maps = [map_1HLL[0] for map_1HLL in net.attention_maps(image_1CHW)]
        depth, shown = len(maps), spread(len(maps), LAYERS)
        rows.append(Row(view.label, [_map_panels(f"blocks.{index}", maps[index]) for index in shown]))
    table = picture_table(
        [f"blocks.{index}" for index in shown], rows, scale="sequential", shared=True,
        caption="Row i of a panel shows where patch i of the image looks, one panel a head, rows summing to one: a "
        "diagonal is a patch that looks at itself, lines beside it are its neighbours. First image of the test "
        f"set.{left_out(depth, LAYERS, 'layers')}",
    )  # fmt: skip
    return Section("Attention maps", (photograph(image_1CHW[0], "The image that the tokens come from."), table))


def _query_key_panels(name: str, weights: AttentionWeights) -> list[Panel]:
    panels = []
    for head in spread(weights.num_heads, HEADS):
        product_DD = query_key_product(weights, head)
        panels.append(Panel(shrink(product_DD, _PIXELS), f"{name} head {head}: {_diagonal(product_DD)}"))
    return panels


def _value_output_panel(name: str, weights: AttentionWeights) -> Panel:
    product_DD = value_output_product(weights)
    return Panel(shrink(product_DD, _PIXELS), f"{name}: {_diagonal(product_DD)}")


def _map_panels(name: str, map_HLL: Tensor) -> list[Panel]:
    panels = []
    for head in spread(len(map_HLL), HEADS):
        own = float(map_HLL[head].diagonal().mean())
        panels.append(Panel(shrink(map_HLL[head], _PIXELS), f"{name} head {head}: {own:.2f} of attention on itself"))
    return panels


def _diagonal(product_DD: Tensor) -> str:
    diagonal_D = product_DD.diagonal()
    rest = product_DD - torch.diag(diagonal_D)
    size = float(rest.square().mean().sqrt())
    return f"mean of the diagonal {float(diagonal_D.mean()):+.3g}, size of the rest {size:.2g}"
