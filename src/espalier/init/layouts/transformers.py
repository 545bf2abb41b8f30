"""Where transformers 5 keeps self-attention."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

from torch import nn

from espalier.init.layouts.linears import ROTARY, fused, separate
from espalier.init.layouts.registry import CROSS, AttentionWeights, Found, Skipped, register_layout

_Q_K_V_O = ("q_proj", "k_proj", "v_proj", "o_proj")
_Q_K_V_OUT = ("q_proj", "k_proj", "v_proj", "out_proj")
_BERT = ("self.query", "self.key", "self.value", "output.dense")

# Class, names of its linear layers, and what is to be known of it.
_SEPARATE = (
    ("vit.modeling_vit.ViTAttention", _Q_K_V_O, ""),
    ("deit.modeling_deit.DeiTAttention", _Q_K_V_O, ""),
    ("dinov2.modeling_dinov2.Dinov2Attention", _Q_K_V_O, ""),
    ("beit.modeling_beit.BeitAttention", _Q_K_V_O, ""),
    ("swin.modeling_swin.SwinAttention", _Q_K_V_O, ""),
    ("swinv2.modeling_swinv2.Swinv2Attention", _BERT, ""),
    ("clip.modeling_clip.CLIPAttention", _Q_K_V_OUT, ""),
    ("siglip.modeling_siglip.SiglipAttention", _Q_K_V_OUT, ""),
    ("bert.modeling_bert.BertAttention", _BERT, ""),
    ("roberta.modeling_roberta.RobertaAttention", _BERT, ""),
    ("electra.modeling_electra.ElectraAttention", _BERT, ""),
    ("distilbert.modeling_distilbert.DistilBertSelfAttention", ("q_lin", "k_lin", "v_lin", "out_lin"), ""),
    ("albert.modeling_albert.AlbertAttention", ("query", "key", "value", "dense"), ""),
    ("t5.modeling_t5.T5Attention", ("q", "k", "v", "o"), ""),
    ("bart.modeling_bart.BartAttention", _Q_K_V_OUT, ""),
    ("whisper.modeling_whisper.WhisperAttention", _Q_K_V_OUT, ""),
    ("opt.modeling_opt.OPTAttention", _Q_K_V_OUT, ""),
    ("gpt_neo.modeling_gpt_neo.GPTNeoSelfAttention", _Q_K_V_OUT, ""),
    ("gptj.modeling_gptj.GPTJAttention", _Q_K_V_OUT, ROTARY),
    ("llama.modeling_llama.LlamaAttention", _Q_K_V_O, ROTARY),
    ("mistral.modeling_mistral.MistralAttention", _Q_K_V_O, ROTARY),
    ("qwen2.modeling_qwen2.Qwen2Attention", _Q_K_V_O, ROTARY),
    ("qwen3.modeling_qwen3.Qwen3Attention", _Q_K_V_O, ROTARY),
    ("gemma.modeling_gemma.GemmaAttention", _Q_K_V_O, ROTARY),
    ("gemma2.modeling_gemma2.Gemma2Attention", _Q_K_V_O, ROTARY),
    ("gemma3.modeling_gemma3.Gemma3Attention", _Q_K_V_O, ROTARY),
    ("phi.modeling_phi.PhiAttention", ("q_proj", "k_proj", "v_proj", "dense"), ROTARY),
)
# The same, and whether the rows go (q, k, v) within each head.
_FUSED = (
    ("phi3.modeling_phi3.Phi3Attention", ("qkv_proj", "o_proj"), False, ROTARY),
    ("modernbert.modeling_modernbert.ModernBertAttention", ("Wqkv", "Wo"), False, ROTARY),
    ("gpt_neox.modeling_gpt_neox.GPTNeoXAttention", ("query_key_value", "dense"), True, ROTARY),
    ("bloom.modeling_bloom.BloomAttention", ("query_key_value", "dense"), True, ""),
)


# Classes that leave scores as they are; others that do not divide by √k state by what they multiply (``scaling``).
_UNSCALED = ("T5Attention", "GPTNeoSelfAttention")


def _separate(module: nn.Module, names: tuple[str, str, str, str], note: str) -> Found:
    if getattr(module, "is_cross_attention", False):
        return Skipped("attention", CROSS)
    return _scaled(module, separate(module, *names, note=note))


def _scaled(module: nn.Module, found: AttentionWeights) -> AttentionWeights:
    """Return views that know by what the module multiplies its scores."""
    stated = 1.0 if type(module).__name__ in _UNSCALED else getattr(module, "scaling", None)
    if not isinstance(stated, float) or not stated > 0:
        return found
    scale = stated * (found.q.shape[0] / found.num_heads) ** 0.5
    return replace(found, score_scale=1.0 if math.isclose(scale, 1.0) else scale)


for _path, _names, _note in _SEPARATE:
    register_layout(f"transformers.models.{_path}")(partial(_separate, names=_names, note=_note))
for _path, _pair, _by_head, _note in _FUSED:
    register_layout(f"transformers.models.{_path}")(
        partial(fused, qkv=_pair[0], out=_pair[1], by_head=_by_head, note=_note)
    )


@register_layout("transformers.models.gpt2.modeling_gpt2.GPT2Attention")
def gpt2_attention(module: nn.Module) -> Found:
    """Return transposed views: ``Conv1D`` stores (in, out), so ``c_attn``'s columns are queries, keys and values."""
    if hasattr(module, "q_attn"):
        return Skipped("attention", CROSS)
    return _scaled(module, fused(module, "c_attn", "c_proj"))
