"""What structure_ wrote is no fault in the doctor's eyes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

import espalier


def loud(net: nn.Module, x: Tensor) -> list[tuple[str, str]]:
    """Return check and layer of the errors and warnings."""
    return [(f.check, f.layer) for f in espalier.diagnose(net, x).findings if f.severity != "note"]


def test_attention_written_near_the_identity_is_healthy_on_noise() -> None:
    # Unlike images, noise has no two patches alike: every query sees its own position almost alone.
    net = espalier.models.VisionTransformer(
        img_size=32, patch_size=4, embed_dim=768, depth=1, num_heads=12, num_classes=10
    )
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    net.pos_embed.mul_(0.1)  # as in timm's, tokens are little more than their patches
    espalier.structure_(net, generator=torch.Generator().manual_seed(0))
    assert not loud(net, x)
    with torch.no_grad():
        net.blocks[0].attn.qkv.weight[: 2 * 768] *= 3  # nine times the scores: at the bound, own position or not
    assert loud(net, x) == [("attention-entropy", "blocks.0.attn")]


def test_a_layer_that_the_report_says_was_written_may_differ_from_its_siblings() -> None:
    net = espalier.models.VisionTransformer(img_size=16, patch_size=4, embed_dim=64, depth=6, num_heads=4)
    for block in net.blocks:
        for weight in (block.attn.qkv.weight, block.attn.proj.weight):
            nn.init.normal_(weight, std=0.02, generator=torch.Generator().manual_seed(0))
    report = espalier.structure_(net.blocks[3], generator=torch.Generator().manual_seed(0))
    odd = {f.layer for f in espalier.diagnose(net).findings if f.check == "out-of-line"}
    assert odd == {"blocks.3.attn.qkv.weight", "blocks.3.attn.proj.weight"}
    rows = tuple(replace(row, layer=f"blocks.3.{row.layer}") for row in report.layers)
    found = espalier.diagnose(net, against=replace(report, layers=rows)).findings
    assert "out-of-line" not in {f.check for f in found}
