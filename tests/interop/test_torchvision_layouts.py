"""Layouts of torchvision, each held against the real module's forward pass, and whole models."""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2
from torchvision.models.vision_transformer import EncoderBlock

import espalier
from reference.attention_probe import check_attention


def test_vit_block_holds_torch_s_own_attention() -> None:
    block = EncoderBlock(3, 24, 32, 0.0, 0.0, nn.LayerNorm).double().eval()
    check_attention(block, lambda x: block.self_attention(x, x, x, average_attn_weights=False), 24, 3)


def test_swin_window_attention() -> None:
    # The maps never leave this function, so one head: its map is what turns V W_proj into the output. Rows of
    # [I; 0] W_V W_proj are known from the one-token pass, and each row of a map sums to one.
    dim = 24
    module = ShiftedWindowAttention(dim, [5, 5], [0, 0], 1).double().eval()
    nn.init.zeros_(module.relative_position_bias_table)

    def attend(x: Tensor) -> Tensor:
        return module(x.reshape(len(x), 5, 5, dim)).flatten(1, 2)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[1] == 1:  # 25 equal tokens attend evenly, so each comes out as one alone would
            return attend(x.expand(-1, 25, -1))[:, :1], torch.empty(0)
        out = attend(x)
        linear = attend(torch.eye(dim).double()[:, None].expand(-1, 25, -1))[:, 0]
        maps = torch.linalg.solve(linear, out, left=False)
        return out, torch.cat([maps, 1 - maps.sum(-1, keepdim=True)], -1)[:, None]

    check_attention(module, run, dim, 1)


def test_whole_models() -> None:
    vit = torchvision.models.VisionTransformer(32, 16, 2, 3, 24, 48)
    swin = torchvision.models.SwinTransformer([4, 4], 24, [1, 1], [3, 3], [4, 4])
    swin_v2 = torchvision.models.SwinTransformer(
        [4, 4], 24, [1, 1], [3, 3], [4, 4],
        block=torchvision.models.swin_transformer.SwinTransformerBlockV2,
        downsample_layer=torchvision.models.swin_transformer.PatchMergingV2,
    )  # fmt: skip
    settings = [
        torchvision.models.convnext.CNBlockConfig(24, 48, 1),
        torchvision.models.convnext.CNBlockConfig(48, None, 1),
    ]
    convnext = torchvision.models.ConvNeXt(settings)
    for model, kind in ((vit, "attention"), (swin, "attention"), (swin_v2, "attention"), (convnext, "depthwise")):
        report = espalier.structure_(model, generator=torch.Generator().manual_seed(0))
        assert [(row.kind, row.status) for row in report.layers] == [(kind, "written")] * 2, str(report)
        assert torch.isfinite(model(torch.randn(2, 3, 32, 32))).all()
        assert espalier.audit(model, against=report).ok
    assert isinstance(swin_v2.features[1][0].attn, ShiftedWindowAttentionV2)
    assert "up to scale" in espalier.audit(swin_v2).layers[0].note
