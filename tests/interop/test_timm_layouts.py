"""Layouts of timm, each held against the real module's forward pass, and whole models by name."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.layers.attention import Attention, AttentionRope
from timm.models.beit import Attention as BeitAttention
from timm.models.convmixer import ConvMixer
from timm.models.eva import EvaAttention
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

import espalier
from reference.attention_probe import Run, check_attention

DIM, HEADS = 24, 3


def with_maps(module: nn.Module) -> Run:
    """Return a forward pass that also gives the maps, as the module hands them to its dropout."""
    maps: list[Tensor] = []
    module.fused_attn = False
    module.attn_drop.register_forward_hook(lambda _, inputs, __: maps.append(inputs[0]))

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        return module(x), maps[-1]

    return run


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_vit_and_beit_attention(qkv_bias: bool) -> None:
    for cls in (Attention, BeitAttention):
        module = cls(DIM, HEADS, qkv_bias=qkv_bias).double()
        check_attention(module, with_maps(module), DIM, HEADS)


@pytest.mark.parametrize("qkv_fused", [True, False])
@pytest.mark.parametrize("separate_bias", [True, False])
def test_eva_attention_with_its_biases_apart(qkv_fused: bool, separate_bias: bool) -> None:
    module = EvaAttention(DIM, HEADS, qkv_fused=qkv_fused, qkv_bias_separate=separate_bias, scale_norm=False).double()
    check_attention(module, with_maps(module), DIM, HEADS)
    [row] = espalier.audit(module).layers
    assert "distance zero" in row.note


def test_rotary_attention_with_grouped_queries() -> None:
    module = AttentionRope(DIM, HEADS, num_kv_heads=1, qkv_fused=False, num_prefix_tokens=0).double()
    check_attention(module, with_maps(module), DIM, HEADS, 1)


def test_swin_window_attention() -> None:
    module = WindowAttention(DIM, HEADS, window_size=5).double()
    nn.init.zeros_(module.relative_position_bias_table)
    run = with_maps(module)

    def in_window(x: Tensor) -> tuple[Tensor, Tensor]:
        # A window holds 25 tokens: 25 equal ones attend evenly, so each comes out as one alone would.
        out, maps = run(x if x.shape[1] == 25 else x.expand(-1, 25, -1).contiguous())
        return out[:, : x.shape[1]], maps

    check_attention(module, in_window, DIM, HEADS)


def test_normed_and_gated_attention_say_so() -> None:
    module = Attention(DIM, HEADS, qk_norm=True, norm_layer=nn.LayerNorm)
    assert "up to scale" in espalier.structure_(module).layers[0].note
    gated = EvaAttention(DIM, HEADS, gated=True, norm_layer=nn.LayerNorm)
    [row] = espalier.structure_(gated).layers
    assert "before the gate" in row.note
    assert "a norm stands before" in row.note


SMALL = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3}
# Model, what makes it small, and how many layers of which kind are written.
MODELS = {
    "vit_tiny_patch16_224": (SMALL, "attention", 2),
    "deit_tiny_patch16_224": (SMALL, "attention", 2),
    "deit_tiny_distilled_patch16_224": (SMALL, "attention", 2),
    "eva02_tiny_patch14_224": ({**SMALL, "img_size": 28}, "attention", 2),
    "beit_base_patch16_224": (SMALL, "attention", 2),
    "swin_tiny_patch4_window7_224": (
        {"img_size": 56, "embed_dim": 24, "depths": (1, 1), "num_heads": (3, 3)}, "attention", 2
    ),
    "convnext_atto": ({"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 48)}, "depthwise", 4),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_models_by_name_are_written_and_run(name: str) -> None:
    changes, kind, count = MODELS[name]
    model = timm.create_model(name, **changes)
    report = espalier.structure_(model, generator=torch.Generator().manual_seed(0))
    assert [(row.kind, row.status) for row in report.layers] == [(kind, "written")] * count, str(report)
    size = changes.get("img_size", 32)
    assert torch.isfinite(model(torch.randn(2, 3, size, size))).all()
    assert espalier.audit(model, against=report).ok


def test_convmixer() -> None:
    model = ConvMixer(32, 3, kernel_size=5, patch_size=4)
    report = espalier.structure_(model, generator=torch.Generator().manual_seed(0))
    assert [(row.kind, row.status) for row in report.layers] == [("depthwise", "written")] * 3


def test_init_weights_undoes_it_and_audit_says_so() -> None:
    model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    report = espalier.structure_(model, generator=torch.Generator().manual_seed(0))
    model.init_weights()
    assert [row.status for row in espalier.audit(model, against=report).layers] == ["lost", "lost"]


def test_timm_s_averaged_model_keeps_it() -> None:
    from timm.utils import ModelEmaV3

    model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    report = espalier.structure_(model, generator=torch.Generator().manual_seed(0))
    assert espalier.audit(ModelEmaV3(model).module, against=report).ok


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "convnext_atto", "xcit_nano_12_p16_224", "pit_ti_224"]
)
def test_doctor_finds_nothing_in_what_structure_wrote(name: str) -> None:
    net = timm.create_model(name, num_classes=100, img_size=32, patch_size=4) if "vit_" in name else None
    net = net or timm.create_model(name, num_classes=100)
    images = torch.randn(2, 3, *(2 * [32 if "vit_" in name else 224]), generator=torch.Generator().manual_seed(0))
    before = {(f.layer, f.check) for f in espalier.diagnose(net, images).findings}
    report = espalier.structure_(net, generator=torch.Generator().manual_seed(0))
    after = espalier.diagnose(net, images, against=report).findings
    assert [f for f in after if f.severity != "note" and (f.layer, f.check) not in before] == []
