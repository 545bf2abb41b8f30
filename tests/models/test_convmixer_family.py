"""The published variants by name, and the maps of a ConvMixer's blocks."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from espalier.errors import EspalierError, MissingExtraError
from espalier.models import ConvMixer, KWLarge, VisionTransformer, build_model, register_with_timm
from espalier.models.convmixer_family import CONVMIXERS

# The published numbers of parameters.
COUNTS = {
    "convmixer_1536_20": 51_625_960,
    "convmixer_768_32": 21_110_248,
    "convmixer_1024_20_ks9_p14": 24_383_464,
    "convmixer_512_16_ks8_p7": 5_357_544,
    "convmixer_1024_12_ks8_p7": 14_621_672,
    "convmixer_256_8_ks9_p1": 706_570,
    "convmixer_256_8_ks5_p2": 594_186,
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(**arguments: object) -> ConvMixer:
    return ConvMixer(8, 4, kernel_size=3, patch_size=2, num_classes=3, **arguments).eval()  # type: ignore[arg-type]


def test_every_variant_has_the_published_number_of_parameters() -> None:
    assert CONVMIXERS.keys() == COUNTS.keys()
    with torch.device("meta"):
        for name, count in COUNTS.items():
            net = build_model(name)
            assert sum(p.numel() for p in net.parameters()) == count, name
            # ReLU belongs to the 768/32 alone.
            kinds = {type(module) for module in net.modules()} & {nn.GELU, nn.ReLU}
            assert kinds == ({nn.ReLU} if name == "convmixer_768_32" else {nn.GELU}), name


def test_a_variant_takes_what_its_class_takes_and_drops_what_the_data_fixes_for_others() -> None:
    with torch.device("meta"):
        net = build_model("convmixer_768_32", num_classes=7, in_chans=1, img_size=32, depth=2)
    assert net.head.out_features == 7
    assert net.stem[0].in_channels == 1
    assert len(net.blocks) == 2
    with pytest.raises(EspalierError, match="did you mean 'kernel_size'"):
        build_model("convmixer_768_32", kernel_sice=3)


@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
def test_intermediate_maps_are_what_the_blocks_return(spatial_dims: int) -> None:
    net = small(spatial_dims=spatial_dims)
    x = torch.randn(2, 3, *(9,) * spatial_dims, generator=seeded())
    expected = [net.blocks[: index + 1](net.stem(x)) for index in range(4)]
    last, maps = net.forward_intermediates(x, indices=[0, -2])
    torch.testing.assert_close(last, expected[3])
    torch.testing.assert_close(tuple(maps), (expected[0], expected[2]))
    assert len(net.forward_intermediates(x, intermediates_only=True)) == 4
    early = net.forward_intermediates(x, indices=[1], stop_early=True)
    torch.testing.assert_close(early[0], expected[1])


def test_feature_info_says_what_the_maps_are_and_pruning_drops_what_they_do_not_need() -> None:
    net = small()
    x = torch.randn(2, 3, 12, 20, generator=seeded())
    expected = [net.blocks[: index + 1](net.stem(x)) for index in (1, 2)]
    assert net.prune_intermediate_layers((-2, 1)) == [2, 1]
    maps = net.forward_intermediates(x, (1, 2), intermediates_only=True)
    torch.testing.assert_close(maps, expected)
    for info, found, block in zip(net.feature_info[1:], maps, (1, 2), strict=True):
        assert found.shape == (2, info["num_chs"], 12 // info["reduction"], 20 // info["reduction"])
        assert net.get_submodule(info["module"]) is net.blocks[block]
    assert not any(name.startswith(("head", "blocks.3")) for name, _ in net.named_parameters())


@pytest.mark.parametrize(
    ("indices", "words"), [(0, "indices 0"), (5, "between 1 and all 4"), ([4], r"\[4\]"), ([-5], "-5"), ([], r"\[\]")]
)
def test_blocks_that_do_not_exist_are_refused(indices: object, words: str) -> None:
    with pytest.raises(EspalierError, match=words):
        small().prune_intermediate_layers(indices)  # type: ignore[arg-type]


def test_pooling_and_dropout_are_timm_s() -> None:
    net = small(drop_rate=0.5)
    x = torch.randn(2, 3, 8, 8, generator=seeded())
    features = net.forward_features(x)
    pooled = nn.functional.adaptive_avg_pool2d(features, 1).flatten(1)
    torch.testing.assert_close(net(x), net.head(pooled))
    net.reset_classifier(0, "")
    torch.testing.assert_close(net(x), features)
    net.reset_classifier(3, "")
    torch.testing.assert_close(net(x), features)
    net.train()
    assert 0.3 < float((net.forward_head(torch.ones(1, 8, 32, 32)) == 0).float().mean()) < 0.7
    with pytest.raises(EspalierError, match="unknown global_pool 'max'"):
        net.reset_classifier(3, "max")
    with pytest.raises(EspalierError, match="num_classes is -1"):
        net.reset_classifier(-1, "avg")
    assert (net.num_classes, net.global_pool, net.head.out_features) == (3, "", 3)  # left as it was
    with pytest.raises(EspalierError, match="unknown global_pool 'max'"):
        small(global_pool="max")
    with pytest.raises(EspalierError, match="unknown output_fmt"):
        net.forward_intermediates(x, output_fmt="NHWC")


@pytest.mark.parametrize("net", [VisionTransformer(8, 4, embed_dim=8, depth=1, num_heads=2), KWLarge(2, img_size=8)])
def test_a_refused_head_leaves_the_old_one(net: VisionTransformer | KWLarge) -> None:
    with pytest.raises(EspalierError, match="num_classes is -1"):
        net.reset_classifier(-1)
    assert net.num_classes == 10 == net.head.out_features


def test_every_parameter_belongs_to_a_group_of_timm_s_matcher() -> None:
    import re

    patterns = small().group_matcher().values()
    names = [name for name, _ in small().named_parameters()]
    assert {name for name in names if not any(re.match(p, name) for p in patterns)} == {"head.weight", "head.bias"}


def test_timm_is_asked_for_only_when_the_user_does(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "timm" not in sys.modules
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtraError, match=r"espalier\[timm\]"):
        register_with_timm()
