"""Where transformers 5 keeps self-attention."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

from torch import nn

from espalier.init.layouts.linears import fused, separate
from espalier.init.layouts.registry import CROSS, ROTARY, AttentionWeights, Refused, register_layout, transformers_path

_Q_K_V_O = ("q_proj", "k_proj", "v_proj", "o_proj")
_Q_K_V_OUT = ("q_proj", "k_proj", "v_proj", "out_proj")
_BERT = ("self.query", "self.key", "self.value", "output.dense")

# By the names of its linear layers and what is to be known of it: the folder and the class before "Attention".
_SEPARATE = {
    (_Q_K_V_O, ""): "vit.ViT deit.DeiT dinov2.Dinov2 beit.Beit swin.Swin",
    (_Q_K_V_OUT, ""): "clip.CLIP siglip.Siglip bart.Bart whisper.Whisper opt.OPT gpt_neo.GPTNeoSelf",
    (_BERT, ""): "swinv2.Swinv2 bert.Bert roberta.Roberta electra.Electra",
    (("q_lin", "k_lin", "v_lin", "out_lin"), ""): "distilbert.DistilBertSelf",
    (("query", "key", "value", "dense"), ""): "albert.Albert",
    (("q", "k", "v", "o"), ""): "t5.T5",
    (_Q_K_V_OUT, ROTARY): "gptj.GPTJ",
    (_Q_K_V_O, ROTARY): "llama.Llama mistral.Mistral qwen2.Qwen2 qwen3.Qwen3 gemma.Gemma gemma2.Gemma2 gemma3.Gemma3",
    (("q_proj", "k_proj", "v_proj", "dense"), ROTARY): "phi.Phi",
}
# The same, and whether the rows go (q, k, v) within each head.
_FUSED = {
    "phi3.Phi3": ("qkv_proj", "o_proj", False, ROTARY),
    "modernbert.ModernBert": ("Wqkv", "Wo", False, ROTARY),
    "gpt_neox.GPTNeoX": ("query_key_value", "dense", True, ROTARY),
    "bloom.Bloom": ("query_key_value", "dense", True, ""),
}


# Classes that leave scores as they are; others that do not divide by √k state by what they multiply (``scaling``).
_UNSCALED = ("T5Attention", "GPTNeoSelfAttention")


def _separate(module: nn.Module, names: tuple[str, str, str, str], note: str) -> AttentionWeights:
    return _scaled(module, separate(module, *names, note=note))


def _scaled(module: nn.Module, found: AttentionWeights) -> AttentionWeights:
    """Return views that know by what the module multiplies its scores."""
    stated = 1.0 if type(module).__name__ in _UNSCALED else getattr(module, "scaling", None)
    if not isinstance(stated, float) or not stated > 0:
        return found
    scale = stated * (found.q.shape[0] / found.num_heads) ** 0.5
    return replace(found, score_scale=1.0 if math.isclose(scale, 1.0) else scale)


for (_names, _note), _hosts in _SEPARATE.items():
    for _host in _hosts.split():
        register_layout(transformers_path(f"{_host}Attention"))(partial(_separate, names=_names, note=_note))
for _host, (_qkv, _out, _by_head, _note) in _FUSED.items():
    register_layout(transformers_path(f"{_host}Attention"))(
        partial(fused, qkv=_qkv, out=_out, by_head=_by_head, note=_note)
    )


@register_layout(transformers_path("gpt2.GPT2Attention"))
def gpt2_attention(module: nn.Module) -> AttentionWeights:
    """Return transposed views: ``Conv1D`` stores (in, out), so ``c_attn``'s columns are queries, keys and values."""
    if hasattr(module, "q_attn"):
        raise Refused("attention", CROSS)
    return _scaled(module, fused(module, "c_attn", "c_proj"))
