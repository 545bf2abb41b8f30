"""Where transformers 5 keeps multi-head latent attention (DeepSeek-V2, V3 and those after them)."""

from __future__ import annotations

from torch import nn

from espalier.init.layouts.linears import matrices
from espalier.init.layouts.registry import LatentAttentionWeights, Refused, register_layout, transformers_path

# AXK2 (a fused gate, and queries from the latent beside its norm) and MistralLarge4 (keys of other layers, a learned
# temperature) are in forms of their own, and have no layout.
_CLASSES = """
    axk1.AXK1Attention bailing_hybrid.BailingHybridAttention deepseek_v2.DeepseekV2Attention
    deepseek_v3.DeepseekV3Attention deepseek_v32.DeepseekV32Attention dots3_note.Dots3NoteTextAttention
    glm4_moe_lite.Glm4MoeLiteAttention glm5_next.Glm5NextTextAttention glm_moe_dsa.GlmMoeDsaAttention
    hy_v4.HYV4Attention kimi_linear.KimiLinearAttention longcat_flash.LongcatFlashMLA minicpm3.MiniCPM3Attention
    mistral4.Mistral4Attention youtu.YoutuAttention
"""
# What a library calls the factors of its normalised latents, where it has any.
_SCALES = (("mla_scale_q_lora", "q_lora_scale"), ("mla_scale_kv_lora", "kv_lora_scale"))


def latent_attention(module: nn.Module) -> LatentAttentionWeights:
    """Return the weights of latent attention: of each head the rows without positions, and both latents.

    ``q_b_proj`` (or ``q_proj``) keeps (n, rotary) rows together for each head, ``kv_b_proj`` (n, m); of
    ``kv_a_proj_with_mqa`` the first r rows are the latent and the rest the rotary keys that all heads share.
    """
    direct = getattr(module, "q_proj", None) is not None
    names: tuple[str, ...] = ("q_proj",) if direct else ("q_b_proj", "q_a_proj")
    names += ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    parts = matrices(module, names)
    q, kv_a, kv_b, out = parts[0], *parts[-3:]
    heads, plain, turned, width, rank = (
        int(getattr(module, name))
        for name in ("num_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")
    )
    fits = len(q) == heads * (plain + turned) and len(kv_b) == heads * (plain + width)
    fits &= len(kv_a) == rank + turned and kv_b.shape[1] == rank and out.shape[1] == heads * width
    if not fits or getattr(module, "num_key_value_groups", 1) != 1:
        raise Refused("attention", "its weights' shapes do not fit together: register a layout for its class")
    if max(rank, 0 if direct else len(parts[1])) > len(out):
        raise Refused("attention", "a latent is wider than the model: there is nothing to approximate")
    k, v = kv_b.unflatten(0, (heads, -1)).split([plain, width], 1)
    scales = [next((float(getattr(module, name)) for name in found if hasattr(module, name)), 1.0) for found in _SCALES]
    gated = any(hasattr(module, name) for name in ("g_proj", "gate_proj"))
    indexed = any(getattr(module, name, None) for name in ("indexer", "skip_topk"))
    notes = [
        "products through latents, which are normalised: they hold up to a factor a token, 1 in the mean",
        f"the {turned} features a head that carry (rotary) positions are left as they were" if turned else "",
        "gated: the VO product holds before the gate" if gated else "",
        "a token sees those that an indexer picks, by norms and gates of its own" if indexed else "",
        "biases are left as they were" if any(module.get_submodule(name).bias is not None for name in names) else "",
    ]
    kv_gain = module.get_parameter("kv_a_layernorm.weight").detach()
    q_down, q_gain = (None, None) if direct else (parts[1], module.get_parameter("q_a_layernorm.weight").detach())
    return LatentAttentionWeights(
        q.unflatten(0, (heads, -1))[:, :plain], k, v, out, kv_a[:rank], kv_gain, heads, q_down, q_gain,
        (scales[0], scales[1]), "; ".join(filter(None, notes)),
    )  # fmt: skip


for _class in _CLASSES.split():
    register_layout(transformers_path(_class))(latent_attention)
