"""Layouts of transformers, each held against the real module's forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import espalier
from reference.attention_probe import check_attention

transformers = pytest.importorskip("transformers")

DIM, HEADS = 24, 3


def config(name: str, **changes: Any) -> Any:
    return getattr(transformers, name)(attn_implementation="eager", **changes)


def encoder(name: str, **changes: Any) -> Any:
    return config(
        name, hidden_size=DIM, num_attention_heads=HEADS, intermediate_size=32, num_hidden_layers=1, **changes
    )


def build(path: str, *args: Any, **kwargs: Any) -> nn.Module:
    """Build an attention module by its path inside transformers.models, in float64."""
    module, _, name = path.rpartition(".")
    return getattr(__import__(f"transformers.models.{module}", fromlist=[name]), name)(*args, **kwargs).double().eval()


def unturned(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of distance zero: rotary positions that turn nothing."""
    return torch.ones(1, x.shape[1], width).double(), torch.zeros(1, x.shape[1], width).double()


VISION = {
    "vit.modeling_vit.ViTAttention": "ViTConfig",
    "deit.modeling_deit.DeiTAttention": "DeiTConfig",
    "dinov2.modeling_dinov2.Dinov2Attention": "Dinov2Config",
    "clip.modeling_clip.CLIPAttention": "CLIPVisionConfig",
    "siglip.modeling_siglip.SiglipAttention": "SiglipVisionConfig",
    "albert.modeling_albert.AlbertAttention": "AlbertConfig",
}


@pytest.mark.parametrize("path", VISION)
def test_encoders_with_four_linear_layers(path: str) -> None:
    module = build(path, encoder(VISION[path]))
    norm, output = getattr(module, "LayerNorm", None), []
    if norm is not None:  # ALBERT's module ends with its residual and norm: look before them
        module.dense.register_forward_hook(lambda _, __, out: output.append(out))
    check_attention(module, lambda x: (lambda r: (output[-1] if norm else r[0], r[1]))(module(x)), DIM, HEADS)


@pytest.mark.parametrize("family", ["bert", "roberta", "electra"])
def test_bert_s_attention_and_output_live_in_two_modules(family: str) -> None:
    name = {"bert": "Bert", "roberta": "Roberta", "electra": "Electra"}[family]
    module = build(f"{family}.modeling_{family}.{name}Attention", encoder(f"{name}Config"))
    before_norm: list[Tensor] = []
    module.output.dense.register_forward_hook(lambda _, __, out: before_norm.append(out))

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        maps = module(x)[1]
        return before_norm[-1], maps

    check_attention(module, run, DIM, HEADS)


def test_distilbert() -> None:
    module = build(
        "distilbert.modeling_distilbert.DistilBertSelfAttention", config("DistilBertConfig", dim=DIM, n_heads=HEADS)
    )
    check_attention(module, module, DIM, HEADS)


def test_beit_and_swin_with_their_position_biases_at_zero() -> None:
    beit = build("beit.modeling_beit.BeitAttention", encoder("BeitConfig"))
    check_attention(beit, beit, DIM, HEADS)
    swin = build("swin.modeling_swin.SwinAttention", config("SwinConfig"), DIM, HEADS, 5)
    nn.init.zeros_(next(swin.relative_position_bias.parameters()))

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        # A window holds 25 tokens: 25 equal ones attend evenly, so each comes out as one alone would.
        out, maps = swin(x if x.shape[1] == 25 else x.expand(-1, 25, -1))
        return out[:, : x.shape[1]], maps

    check_attention(swin, run, DIM, HEADS)


def test_gpt2_stores_the_transpose() -> None:
    module = build("gpt2.modeling_gpt2.GPT2Attention", config("GPT2Config", n_embd=DIM, n_head=HEADS), layer_idx=0)
    check_attention(module, module, DIM, HEADS)


GROUPED = {
    "llama.modeling_llama.LlamaAttention": "LlamaConfig",
    "mistral.modeling_mistral.MistralAttention": "MistralConfig",
    "qwen2.modeling_qwen2.Qwen2Attention": "Qwen2Config",
    "gemma.modeling_gemma.GemmaAttention": "GemmaConfig",
    "phi3.modeling_phi3.Phi3Attention": "Phi3Config",
    "phi.modeling_phi.PhiAttention": "PhiConfig",
}


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("path", GROUPED)
def test_rotary_decoders_with_and_without_grouped_queries(path: str, groups: int) -> None:
    sizes = {"num_key_value_heads": groups, "head_dim": 8, "pad_token_id": 0}
    module = build(path, config(GROUPED[path], hidden_size=32, num_attention_heads=4, **sizes), layer_idx=0)
    width = getattr(module, "rotary_ndims", 8)
    check_attention(module, lambda x: module(x, unturned(x, width), None), 32, 4, groups)
    [row] = espalier.audit(module).layers
    assert "distance zero" in row.note


def test_head_width_need_not_be_the_model_s_share_and_qk_norm_is_noted() -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
    module = build("llama.modeling_llama.LlamaAttention", config("LlamaConfig", **sizes), layer_idx=0)
    check_attention(module, lambda x: module(x, unturned(x, 16), None), 32, 4, width=16)
    normed = build("qwen3.modeling_qwen3.Qwen3Attention", config("Qwen3Config", **sizes), layer_idx=0)
    [row] = espalier.structure_(normed).layers
    assert "up to scale" in row.note
    assert "distance zero" in row.note


@pytest.mark.parametrize("width", [32, 48, 64])
def test_a_layer_norm_of_the_queries_takes_away_what_its_channels_share(width: int) -> None:
    sizes = config(
        "PersimmonConfig", hidden_size=width, num_attention_heads=4, intermediate_size=8, num_hidden_layers=1
    )
    [row] = espalier.structure_(build("persimmon.modeling_persimmon.PersimmonModel", sizes)).layers
    assert row.status == "written"
    assert "up to scale" in row.note


def test_rows_interleaved_by_head() -> None:
    neox = build(
        "gpt_neox.modeling_gpt_neox.GPTNeoXAttention",
        config("GPTNeoXConfig", hidden_size=DIM, num_attention_heads=HEADS),
        layer_idx=0,
    )
    check_attention(neox, lambda x: neox(x, None, position_embeddings=unturned(x, neox.rotary_ndims)), DIM, HEADS)
    bloom = build("bloom.modeling_bloom.BloomAttention", config("BloomConfig", n_embed=DIM, n_head=HEADS), layer_idx=0)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        length = x.shape[1]
        alibi = torch.zeros(len(x) * HEADS, 1, length).double()
        return bloom(x, torch.zeros_like(x), alibi, torch.zeros(length, length).double(), output_attentions=True)[:2]

    check_attention(bloom, run, DIM, HEADS)


def test_opt_whisper_and_modernbert() -> None:
    opt = build("opt.modeling_opt.OPTAttention", config("OPTConfig", hidden_size=DIM, num_attention_heads=HEADS))
    whisper = build(
        "whisper.modeling_whisper.WhisperAttention", DIM, HEADS, config=config("WhisperConfig", d_model=DIM)
    )
    for module in (opt, whisper):
        check_attention(module, lambda x, module=module: module(x)[:2], DIM, HEADS)
    modern = build("modernbert.modeling_modernbert.ModernBertAttention", encoder("ModernBertConfig"), layer_idx=0)
    check_attention(modern, lambda x: modern(x, unturned(x, 8))[:2], DIM, HEADS)


def test_t5_does_not_divide_its_logits() -> None:
    t5 = build("t5.modeling_t5.T5Attention", config("T5Config", d_model=DIM, num_heads=HEADS, d_kv=8))
    check_attention(
        t5, lambda x: (lambda r: (r[0], r[-1]))(t5(x, output_attentions=True)), DIM, HEADS, width=8, scale=1.0
    )


def tiny(name: str, **changes: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        cls, _, configuration = name.partition(":")
        return getattr(transformers, cls)(config(configuration, **changes))

    return make


BERT = {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 32, "vocab_size": 50}
VIT = {**BERT, "image_size": 16, "patch_size": 4}
del VIT["vocab_size"]
BART = {"d_model": 24, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 3,
        "decoder_attention_heads": 3, "vocab_size": 50, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}  # fmt: skip

# Whole models: how many layers are written and how many skipped.
WHOLE = {
    "ViTModel:ViTConfig": (VIT, 2, 0),
    "BertModel:BertConfig": ({**BERT, "is_decoder": True, "add_cross_attention": True}, 2, 2),
    "BartModel:BartConfig": (BART, 2, 1),
    "T5Model:T5Config": (
        {"d_model": 24, "num_heads": 3, "d_kv": 8, "num_layers": 1, "num_decoder_layers": 1, "vocab_size": 50}, 2, 1
    ),
    "GPT2Model:GPT2Config": (
        {"n_embd": 24, "n_head": 3, "n_layer": 2, "vocab_size": 50, "add_cross_attention": True}, 2, 2
    ),
    "SwinModel:SwinConfig": (
        {"embed_dim": 24, "depths": [1, 1], "num_heads": [3, 3], "image_size": 32, "window_size": 2}, 2, 0
    ),
    "Swinv2Model:Swinv2Config": (
        {"embed_dim": 24, "depths": [1, 1], "num_heads": [3, 3], "image_size": 32, "window_size": 2}, 2, 0
    ),
    "WhisperModel:WhisperConfig": ({**BART, "num_mel_bins": 8, "max_source_positions": 16, "pad_token_id": 0}, 2, 1),
    "OPTModel:OPTConfig": ({**BERT, "ffn_dim": 32, "word_embed_proj_dim": 24}, 2, 0),
    "GPTNeoModel:GPTNeoConfig": (
        {"hidden_size": 24, "num_heads": 3, "num_layers": 2, "attention_types": [[["global"], 2]], "vocab_size": 50},
        2, 0,
    ),
    "GPTJModel:GPTJConfig": ({"n_embd": 24, "n_head": 3, "n_layer": 2, "vocab_size": 50, "rotary_dim": 4}, 2, 0),
    "Gemma2Model:Gemma2Config": ({**BERT, "num_key_value_heads": 1, "head_dim": 8}, 2, 0),
    "Gemma3TextModel:Gemma3TextConfig": ({**BERT, "num_key_value_heads": 1, "head_dim": 8}, 2, 0),
    "ModernBertModel:ModernBertConfig": ({**BERT, "pad_token_id": 0}, 2, 0),
    "LlamaForCausalLM:LlamaConfig": ({**BERT, "num_key_value_heads": 1}, 2, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_whole_models_find_every_self_attention_and_say_what_they_skip(name: str) -> None:
    changes, written, skipped = WHOLE[name]
    model = tiny(name, **changes)()
    report = espalier.structure_(model, generator=torch.Generator().manual_seed(0))
    statuses = [row.status for row in report.layers]
    assert (statuses.count("written"), statuses.count("skipped")) == (written, skipped), str(report)
    assert all("cross-attention" in row.note for row in report.layers if row.status == "skipped")
    assert espalier.audit(model, against=report).ok


class OwnDecoder(nn.Module):
    """A block of the user's own around a library's attention, which may be handed another sequence."""

    def __init__(self, cross: bool) -> None:
        super().__init__()
        self.cross = cross
        attention = transformers.models.bart.modeling_bart.BartAttention
        self.first, self.second = (attention(DIM, HEADS, config=config("BartConfig", **BART)) for _ in range(2))

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        x = x + self.first(x)[0]
        return x + self.second(x, key_value_states=other if self.cross else None)[0]


def test_a_library_s_attention_in_a_block_of_the_user_s_own_is_asked_whose_keys_it_gets() -> None:
    for cross, status in ((True, "skipped"), (False, "written")):
        first, second = espalier.structure_(OwnDecoder(cross), generator=torch.Generator().manual_seed(0)).layers
        assert (first.status, second.status) == ("written", status)
        assert ("cross-attention" in second.note) == cross


def test_a_part_of_bert_s_attention_with_code_of_the_user_s_own_is_run() -> None:
    original = transformers.models.bert.modeling_bert.BertSelfAttention

    class Mixed(original):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
            rows = (self.value(x), self.query(x), self.key(x))
            q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in rows)
            return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), None

    model = tiny("BertModel:BertConfig", **BERT)()
    model.encoder.layer[0].attention.self = Mixed(model.config)
    report = espalier.structure_(model, generator=torch.Generator().manual_seed(0))
    assert [row.status for row in report.layers] == ["skipped", "written"]
    assert "not proven by a run" in report.layers[0].note
