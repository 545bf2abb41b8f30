"""Where ``torch.nn`` keeps self-attention and depthwise filters."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from espalier.init.filters.closed_form import is_depthwise
from espalier.init.layouts.registry import CROSS, AttentionWeights, DepthwiseWeights, Found, Skipped, register_layout


@register_layout(nn.MultiheadAttention)
def multihead_attention(module: nn.Module) -> Found:
    """Return views into ``in_proj_weight`` (rows q, k, v) and ``out_proj``."""
    assert isinstance(module, nn.MultiheadAttention)
    if module.in_proj_weight is None:
        return Skipped("attention", "keys or values have a width of their own (kdim, vdim): this is cross-attention")
    q, k, v = module.in_proj_weight.detach().chunk(3)
    biases = tuple(bias.detach() for bias in (module.in_proj_bias, module.out_proj.bias) if bias is not None)
    note = "bias_k and bias_v left alone" if module.bias_k is not None else ""
    return AttentionWeights(q, k, v, module.out_proj.weight.detach(), module.num_heads, module.num_heads, biases, note)


@register_layout(nn.TransformerDecoderLayer)
def decoder_layer(module: nn.Module) -> Mapping[str, Found]:
    """Return the self-attention; cross-attention compares two sequences, so no identity is meant there."""
    assert isinstance(module, nn.TransformerDecoderLayer)
    return {
        "self_attn": multihead_attention(module.self_attn),
        "multihead_attn": Skipped("attention", CROSS),
    }


@register_layout(nn.Conv1d)
@register_layout(nn.Conv2d)
@register_layout(nn.Conv3d)
def depthwise_convolution(module: nn.Module) -> Found | None:
    """Return a view of the filters, (channels, 1, *kernel), of a depthwise convolution; other ones are left alone."""
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    each, rest = divmod(module.out_channels, module.in_channels)
    if module.groups == module.in_channels > 1 and each > 1 and not rest and max(module.kernel_size) > 2:
        return Skipped("depthwise", f"it has {each} filters a channel: the covariance is known of one a channel")
    if not is_depthwise(module):
        return None
    if max(module.kernel_size) < 3 or 2 in module.kernel_size:
        return Skipped("depthwise", f"kernel {tuple(module.kernel_size)} has fewer than 3 taps along an axis")
    return DepthwiseWeights(module.weight.detach())
