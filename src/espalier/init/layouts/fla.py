"""Where flash-linear-attention keeps the maps of its linear attention; its Mamba-2 keeps the reference's names."""

from __future__ import annotations

from torch import nn

from espalier.init.layouts.linears import separate
from espalier.init.layouts.registry import Found, register_layout


@register_layout("fla.layers.gla.GatedLinearAttention")
@register_layout("fla.layers.gated_deltanet.GatedDeltaNet")
@register_layout("fla.layers.delta_net.DeltaNet")
@register_layout("fla.layers.linear_attn.LinearAttention")
@register_layout("fla.layers.multiscale_retention.MultiScaleRetention")
def linear_attention(module: nn.Module) -> Found:
    """Return its four projections; what stands between them and the product is said in the note."""
    steps = []
    if getattr(module, "use_short_conv", False):
        steps.append("short convolutions act on queries, keys and values before the products")
    if hasattr(module, "A_log") or hasattr(module, "gk_proj"):
        steps.append("it forgets by a gate: the products hold at distance zero")
    return separate(module, "q_proj", "k_proj", "v_proj", "o_proj", note="; ".join(steps))
