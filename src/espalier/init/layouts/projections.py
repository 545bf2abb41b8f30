"""Where our models, timm, torchvision and flash-linear-attention keep the projections of attention."""

from __future__ import annotations

from torch import nn

from espalier.init.layouts.linears import fused, separate
from espalier.init.layouts.registry import ROTARY, AttentionWeights, register_layout


@register_layout("espalier.models.vit.Attention")
@register_layout("espalier.models.sequence.CausalSelfAttention")
@register_layout("timm.layers.attention.Attention")
@register_layout("timm.models.vision_transformer.Attention")
@register_layout("timm.models.beit.Attention")
@register_layout("timm.models.swin_transformer.WindowAttention")
@register_layout("torchvision.models.swin_transformer.ShiftedWindowAttention")
@register_layout("torchvision.models.swin_transformer.ShiftedWindowAttentionV2")
def qkv_proj(module: nn.Module) -> AttentionWeights:
    """Return views into ``qkv.weight``, whose rows are all queries, all keys, all values, and ``proj.weight``."""
    return fused(module, "qkv", "proj")


@register_layout("timm.models.eva.EvaAttention")
@register_layout("timm.layers.attention.AttentionRope")
def maybe_fused(module: nn.Module) -> AttentionWeights:
    """Return views of one fused layer or of three, whichever this instance was built with."""
    if isinstance(getattr(module, "qkv", None), nn.Module):
        return fused(module, "qkv", "proj", note=ROTARY)
    return separate(module, "q_proj", "k_proj", "v_proj", "proj", note=ROTARY)


@register_layout("fla.layers.gla.GatedLinearAttention")
@register_layout("fla.layers.gated_deltanet.GatedDeltaNet")
@register_layout("fla.layers.delta_net.DeltaNet")
@register_layout("fla.layers.linear_attn.LinearAttention")
@register_layout("fla.layers.multiscale_retention.MultiScaleRetention")
def linear_attention(module: nn.Module) -> AttentionWeights:
    """Return its four projections; what stands between them and the product is said in the note."""
    steps = []
    if getattr(module, "use_short_conv", False):
        steps.append("short convolutions act on queries, keys and values before the products")
    if hasattr(module, "A_log") or hasattr(module, "gk_proj"):
        steps.append("it forgets by a gate: the products hold at distance zero")
    return separate(module, "q_proj", "k_proj", "v_proj", "o_proj", note="; ".join(steps))
