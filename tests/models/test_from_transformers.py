"""Classes of transformers in recipes: the host's own network, its own draw, and structure where it belongs."""

from __future__ import annotations

import pytest
import torch

import espalier
from espalier import data
from espalier.errors import EspalierError
from espalier.models import TransformersConvNext, TransformersViT
from espalier.models.vit import sincos_positions
from espalier.recipes import get_recipe
from espalier.train.build import build_bare_model

transformers = pytest.importorskip("transformers")


def test_logits_are_the_hosts_features_averaged_over_patches() -> None:
    model = TransformersViT(img_size=8, patch_size=4, in_chans=1, num_classes=3, embed_dim=24, depth=2, num_heads=3)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    hidden = model.backbone(x).last_hidden_state
    assert hidden.shape == (2, 5, 24)
    expected = hidden[:, 1:].mean(1) @ model.head.weight.T + model.head.bias
    assert torch.allclose(model(x), expected, atol=1e-6)
    assert model.backbone.embeddings.position_embeddings[0, 1:].equal(sincos_positions(2, 2, 24))


def test_structure_finds_every_block_of_the_vit() -> None:
    model = TransformersViT(img_size=8, patch_size=4, embed_dim=24, depth=2, num_heads=3)
    rows = espalier.structure_(model, generator=torch.Generator().manual_seed(0)).layers
    assert [(row.kind, row.status) for row in rows] == [("attention", "written")] * 2


def test_structure_finds_every_filter_of_the_convnext() -> None:
    model = TransformersConvNext(patch_size=2, depths=(1, 2), dims=(8, 16), layer_scale=0.5)
    rows = espalier.structure_(model, generator=torch.Generator().manual_seed(0)).layers
    assert [(row.kind, row.status) for row in rows] == [("depthwise", "written")] * 3
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 10)
    scales = [p for name, p in model.named_parameters() if "layer_scale" in name]
    assert len(scales) == 3
    assert all((p == 0.5).all() for p in scales)


@pytest.mark.parametrize("name", ["cifar10_vit_tiny", "convnext_filters"])
def test_a_seed_gives_the_same_weights_and_leaves_the_global_stream_alone(name: str) -> None:
    recipe = get_recipe(name)
    before = torch.get_rng_state()
    one, two = (build_bare_model(recipe, {**recipe.model_args, "num_classes": 10}) for _ in range(2))
    assert torch.get_rng_state().equal(before)
    assert all(a.equal(b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert recipe.dataset in data.SOURCES


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(EspalierError, match="patch_size 3"):
        TransformersViT(img_size=8, patch_size=3)
    with pytest.raises(EspalierError, match="num_heads is 0"):
        TransformersViT(embed_dim=24, num_heads=0)
    with pytest.raises(EspalierError, match="num_heads 5"):
        TransformersViT(embed_dim=24, num_heads=5)
    with pytest.raises(EspalierError, match="differ in number"):
        TransformersConvNext(depths=(1,), dims=(8, 16))
    with pytest.raises(EspalierError, match="depth is 0: give a whole number from 1"):
        TransformersViT(depth=0)
    with pytest.raises(EspalierError, match=r"depths\[1\] is 0: give a whole number from 1"):
        TransformersConvNext(depths=(1, 0), dims=(8, 16))
    with pytest.raises(EspalierError, match="stages is 0"):
        TransformersConvNext(depths=(), dims=())
