"""Where our own models keep attention: a fused ``qkv`` (rows q, k, v) and ``proj``."""

from __future__ import annotations

from torch import nn

from espalier.init.layouts.registry import AttentionWeights, Found, refuse_parametrized, register_layout


@register_layout("espalier.models.vit.Attention")
@register_layout("espalier.models.sequence.CausalSelfAttention")
def fused_attention(module: nn.Module) -> Found:
    """Return views into ``qkv.weight``, whose rows are H·k of queries, then H_kv·k of keys and of values."""
    if refused := refuse_parametrized(module, "attention"):
        return refused
    heads = int(module.num_heads)  # type: ignore[arg-type]
    groups = int(getattr(module, "num_kv_heads", None) or heads)
    qkv, proj = module.get_submodule("qkv"), module.get_submodule("proj")
    assert isinstance(qkv, nn.Linear)
    assert isinstance(proj, nn.Linear)
    width = qkv.out_features // (heads + 2 * groups)
    q, k, v = qkv.weight.detach().split([heads * width, groups * width, groups * width])
    biases = tuple(layer.bias.detach() for layer in (qkv, proj) if layer.bias is not None)
    return AttentionWeights(q, k, v, proj.weight.detach(), heads, groups, biases)
