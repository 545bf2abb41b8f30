"""Where our models, timm and torchvision keep self-attention: one fused ``qkv`` and ``proj``."""

from __future__ import annotations

from torch import nn

from espalier.init.layouts.linears import ROTARY, fused, separate
from espalier.init.layouts.registry import Found, register_layout


@register_layout("espalier.models.vit.Attention")
@register_layout("espalier.models.sequence.CausalSelfAttention")
@register_layout("timm.layers.attention.Attention")
@register_layout("timm.models.vision_transformer.Attention")
@register_layout("timm.models.beit.Attention")
@register_layout("timm.models.swin_transformer.WindowAttention")
@register_layout("torchvision.models.swin_transformer.ShiftedWindowAttention")
@register_layout("torchvision.models.swin_transformer.ShiftedWindowAttentionV2")
def qkv_proj(module: nn.Module) -> Found:
    """Return views into ``qkv.weight``, whose rows are all queries, all keys, all values, and ``proj.weight``."""
    return fused(module, "qkv", "proj")


@register_layout("timm.models.eva.EvaAttention")
@register_layout("timm.layers.attention.AttentionRope")
def maybe_fused(module: nn.Module) -> Found:
    """Return views of one fused layer or of three, whichever this instance was built with."""
    if isinstance(getattr(module, "qkv", None), nn.Module):
        return fused(module, "qkv", "proj", note=ROTARY)
    return separate(module, "q_proj", "k_proj", "v_proj", "proj", note=ROTARY)
