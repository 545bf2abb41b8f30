"""Pictures of products of two weights, which starts correlate, without ever holding the product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from espalier.init.layouts import AttentionWeights
from espalier.init.layouts.registry import SSMWeights
from espalier.report.raster import Panel
from espalier.report.section import Section
from espalier.report.views import HEADS, LAYERS, View, layer_pictures, layers_of, left_out
from espalier.study.statistics import spread

SIDE = 96
"""Side of the largest picture of a product, in pixels."""

# Pixels of all pictures of one kind together: a page holds a few megabytes.
_PIXELS = 1_500_000


def product_picture(left_KD: Tensor, right_KD: Tensor, side: int = SIDE) -> Tensor:
    """Return ``leftᵀ right`` as at most ``side`` × ``side`` means over equal blocks.

    The mean over a block of a product is the product of the factors' means, so the d × d matrix is never held.
    """
    side = min(side, left_KD.shape[1])
    return F.adaptive_avg_pool1d(left_KD[None], side)[0].mT @ F.adaptive_avg_pool1d(right_KD[None], side)[0]


def product_panel(name: str, left_KD: Tensor, right_KD: Tensor, side: int) -> Panel:
    """Return the picture of ``leftᵀ right`` and in words the mean of its diagonal and the size of the rest."""
    # The size of the product off its diagonal, again without holding it: ‖LᵀR‖² = ⟨L Lᵀ, R Rᵀ⟩.
    diagonal_D = (left_KD * right_KD).sum(0)
    total = ((left_KD @ left_KD.mT) * (right_KD @ right_KD.mT)).sum()
    pairs = max(len(diagonal_D) * (len(diagonal_D) - 1), 1)
    rest = float(((total - diagonal_D.square().sum()).clamp_min(0) / pairs).sqrt())
    words = f"{name}: diagonal {float(diagonal_D.mean()):+.3g} on average, the other entries ± {rest:.2g}"
    return Panel(product_picture(left_KD, right_KD, side), words)


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
    found = layers_of(views, AttentionWeights)
    if not found:
        return None
    alone = len(found) == 1
    every = [weights for _, named in found for _, weights in named]  # arms may differ in depth, width and heads
    layers, heads = max(len(named) for _, named in found), max(weights.num_heads for weights in every)
    dim = max(weights.q.shape[-1] for weights in every)
    shown_heads = heads if alone else min(heads, HEADS)
    count = (layers if alone else len(found) * min(layers, LAYERS)) * shown_heads
    side = max(32, min(SIDE, int((_PIXELS / count) ** 0.5)))

    def query_key(name: str, weights: AttentionWeights) -> list[Panel]:
        picked = spread(weights.num_heads, shown_heads)
        return [product_panel(f"{name} head {head}", *query_key_factors(weights, head), side) for head in picked]

    def value_output(name: str, weights: AttentionWeights) -> list[Panel]:
        return [product_panel(name, *value_output_factors(weights), side)]

    pixels = _pixel_words(dim, side)
    words = f"A red diagonal says that tokens look at tokens like themselves.{left_out(heads, shown_heads, 'heads')}"
    qk = layer_pictures("W_Q W_Kᵀ of every head", found, query_key, words + pixels, shared=True)
    words = "A blue diagonal says that a layer takes away part of what it looks at."
    vo = layer_pictures("W_V W_proj of every layer", found, value_output, words + pixels, shared=True)
    return Section("Products of attention weights", (qk, vo))


@torch.no_grad()
def state_space_products(views: Sequence[View]) -> Section | None:
    """Draw ``W_Cᵀ W_B``, which mimetic initialisation correlates, for every network that has state-space layers."""
    found = layers_of(views, SSMWeights)
    if not found:
        return None

    def panels(name: str, weights: SSMWeights) -> list[Panel]:
        w_c_GND, w_b_GND = (w.float().unflatten(0, (weights.groups, -1)) for w in (weights.w_c, weights.w_b))
        picked = spread(weights.groups, HEADS)
        return [product_panel(f"{name} group {group}", w_c_GND[group], w_b_GND[group], SIDE) for group in picked]

    every = [weights for _, named in found for _, weights in named]
    groups, width = max(weights.groups for weights in every), max(weights.w_b.shape[1] for weights in every)
    table = layer_pictures(
        "W_Cᵀ W_B of every layer", found, panels,
        "A red diagonal says that a token reads from the state what tokens like itself wrote there; without one, what "
        "is written and what is read have nothing to do with each other."
        + left_out(groups, HEADS, "groups") + _pixel_words(width, SIDE),
    )  # fmt: skip
    return Section("Products of state-space weights", (table,))


def _pixel_words(width: int, side: int) -> str:
    size = f"{width / side:.3g}"
    return f" A pixel is the mean over about {size} × {size} entries." if width > side else ""
