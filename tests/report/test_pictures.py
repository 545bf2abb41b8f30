"""Pictures of weights: every pixel against a plain loop, and the page of one network."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from drawn import assert_same_picture, pixels
from espalier.errors import EspalierError
from espalier.init import AttentionWeights, DepthwiseWeights
from espalier.init.layouts import find_layers
from espalier.init.layouts.registry import SSMWeights
from espalier.models import ConvMixer, SequenceModel, VisionTransformer
from espalier.report import write_weight_pictures
from espalier.report.filters import eigen_filters
from espalier.report.products import product_panel, product_picture, query_key_factors, value_output_factors
from espalier.report.raster import mosaic, png_address, shrink, value_limit
from espalier.study.statistics import spread
from reference.attention_reference import head_products, value_output_product


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def block_means(matrix: Tensor, side: int) -> Tensor:
    size = len(matrix) // side
    means = torch.empty(side, side, dtype=matrix.dtype)
    for i in range(side):
        for j in range(side):
            means[i, j] = matrix[i * size : (i + 1) * size, j * size : (j + 1) * size].mean()
    return means


@pytest.mark.parametrize("side", [24, 6])
def test_products_of_our_attention_equal_the_plain_ones(side: int) -> None:
    net = VisionTransformer(img_size=8, patch_size=4, in_chans=1, embed_dim=24, depth=1, num_heads=3)
    ((_, _, weights),) = find_layers(net)
    assert isinstance(weights, AttentionWeights)
    for head, expected in enumerate(head_products(weights.q, weights.k, 3)):
        drawn = product_picture(*query_key_factors(weights, head), side)
        torch.testing.assert_close(drawn.double(), block_means(expected, side), rtol=1e-4, atol=1e-8)
    drawn = product_picture(*value_output_factors(weights), side)
    expected = block_means(value_output_product(weights.v, weights.out), side)
    torch.testing.assert_close(drawn.double(), expected, rtol=1e-4, atol=1e-8)


def test_query_heads_that_share_keys_and_values_meet_their_own_group() -> None:
    q, out = torch.randn(4 * 3, 10, generator=seeded()), torch.randn(10, 4 * 3, generator=seeded(1))
    k, v = torch.randn(2 * 3, 10, generator=seeded(2)), torch.randn(2 * 3, 10, generator=seeded(3))
    weights = AttentionWeights(q, k, v, out, num_heads=4, num_kv_heads=2)
    total = torch.zeros(10, 10)
    for head in range(4):
        mine, shared = slice(3 * head, 3 * head + 3), slice(3 * (head // 2), 3 * (head // 2) + 3)
        torch.testing.assert_close(product_picture(*query_key_factors(weights, head)), q[mine].T @ k[shared])
        total += v[shared].T @ out[:, mine].T
    torch.testing.assert_close(product_picture(*value_output_factors(weights)), total)


def test_heads_kept_apart_make_the_same_pictures() -> None:
    flat = [torch.randn(12, 10, generator=seeded(seed)) for seed in range(3)]
    out = torch.randn(10, 12, generator=seeded(3))
    rows = AttentionWeights(*flat, out, num_heads=4, num_kv_heads=4)
    apart = AttentionWeights(*(weight.reshape(4, 3, 10) for weight in flat), out, num_heads=4, num_kv_heads=4)
    for head in range(4):
        assert torch.equal(query_key_factors(apart, head)[0], query_key_factors(rows, head)[0])
        assert torch.equal(query_key_factors(apart, head)[1], query_key_factors(rows, head)[1])
    assert torch.equal(value_output_factors(apart)[0], value_output_factors(rows)[0])


def test_words_under_a_product_are_its_diagonal_and_the_rest() -> None:
    left, right = torch.randn(3, 8, generator=seeded()), torch.randn(3, 8, generator=seeded(1))
    product = left.double().T @ right.double()
    off = product[~torch.eye(8, dtype=torch.bool)]
    panel = product_panel("x", left, right, 8)
    mean, spread = re.fullmatch(r"x: diagonal ([+-]\S+) on average, the other entries ± (\S+)", panel.words).groups()
    assert float(mean) == pytest.approx(product.diagonal().mean().item(), rel=6e-3)  # shown with three digits
    assert float(spread) == pytest.approx(off.square().mean().sqrt().item(), rel=6e-2)  # and with two


def test_page_of_a_sequence_model_shows_what_is_written_and_read(tmp_path: Path) -> None:
    net = SequenceModel(vocab_size=8, dim=16, pattern="mamba1 mamba2 attention", state_size=8, head_dim=8)
    text = write_weight_pictures(net, tmp_path / "weights.html").read_text()
    for name, _, weights in find_layers(net):
        if isinstance(weights, SSMWeights):
            limit = value_limit([expected := weights.w_c.T @ weights.w_b])
            (address,) = re.findall(rf'<img src="([^"]+)" alt="{re.escape(name)} group 0', text)
            assert_same_picture(address, png_address(expected, -limit, limit, "diverging"))
    assert text.count("W_Cᵀ W_B") == 1


def test_shrink_takes_block_means_and_leaves_small_pictures_alone() -> None:
    matrix = torch.randn(12, 12, generator=seeded())
    torch.testing.assert_close(shrink(matrix, 4), block_means(matrix, 4))
    assert shrink(matrix, 12) is matrix


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 3), st.integers(1, 5))
def test_mosaic_puts_every_tile_in_its_place(count: int, height: int, width: int, columns: int) -> None:
    tiles = torch.arange(count * height * width, dtype=torch.float64).reshape(count, height, width)
    canvas = mosaic(tiles, columns)
    for tile in range(count):
        top, left = tile // columns * (height + 1), tile % columns * (width + 1)
        assert torch.equal(canvas[top : top + height, left : left + width], tiles[tile])
    assert int(canvas.isfinite().sum()) == tiles.numel()


def test_colours_run_from_blue_through_white_to_red_and_nan_is_transparent() -> None:
    drawn = pixels(png_address(torch.tensor([[-1.0, 0.0, 1.0, 9.0, torch.nan]]), -1.0, 1.0, "diverging"))[0]
    assert drawn[0].tolist() == [5, 48, 97, 255]
    assert drawn[1].tolist() == [247, 247, 247, 255]
    assert drawn[2].tolist() == drawn[3].tolist() == [103, 0, 31, 255]
    assert drawn[4, 3] == 0


def test_one_outlier_does_not_set_the_scale() -> None:
    values = torch.ones(1000)
    values[0] = 1e6
    assert value_limit([values, torch.tensor([torch.nan])]) == 1.0


def test_eigen_filters_of_a_known_covariance() -> None:
    basis, _ = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64, generator=seeded()))
    values = torch.tensor([8.0, 4, 2, 1, 1e-3, 1e-4, 1e-5, 1e-6, 0], dtype=torch.float64)
    filters, shares = eigen_filters((basis * values) @ basis.mT, 4)
    torch.testing.assert_close(shares, values[:4] / values.sum())
    torch.testing.assert_close((filters @ basis[:, :4]).abs(), torch.eye(4, dtype=torch.float64), atol=1e-6, rtol=0)
    assert (filters.gather(1, filters.abs().argmax(1, keepdim=True)) > 0).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(2, 6))
def test_spread_keeps_both_ends(count: int, shown: int) -> None:
    picked = spread(count, shown)
    assert len(picked) == min(count, shown) == len(set(picked))
    assert picked == sorted(picked)
    assert (picked[0], picked[-1]) == (0, count - 1)


def test_page_of_a_transformer_shows_every_head_of_every_layer(tmp_path: Path) -> None:
    net = VisionTransformer(img_size=8, patch_size=4, in_chans=1, embed_dim=40, depth=6, num_heads=5)
    text = write_weight_pictures(net, tmp_path / "new" / "weights.html").read_text()
    images = dict(re.findall(r'<img src="([^"]+)" alt="([^":]+)', text))
    assert sorted(images.values()) == sorted(
        [f"blocks.{layer}.attn head {head}" for layer in range(6) for head in range(5)]
        + [f"blocks.{layer}.attn" for layer in range(6)]
    )
    # No figure needs a script, so none is there.
    assert "<script" not in text


def test_page_of_a_convmixer_shows_filters_as_they_are(tmp_path: Path) -> None:
    net = ConvMixer(dim=8, depth=2, kernel_size=5, patch_size=2)
    text = write_weight_pictures(net, tmp_path / "weights.html").read_text()
    found = {name: weights for name, _, weights in find_layers(net)}
    for name, weights in found.items():
        assert isinstance(weights, DepthwiseWeights)
        filters = weights.weight.detach()
        (address,) = re.findall(rf'<img src="([^"]+)" alt="{re.escape(name)}: filters"', text)
        drawn, limit = pixels(address)[:5, :5], value_limit([filters])
        expected = pixels(png_address(filters[0, 0], -limit, limit, "diverging"))
        assert (drawn == expected).all()


def test_filters_along_one_axis_are_drawn_too(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv1d(6, 6, 4, groups=6, padding="same"), nn.Conv3d(6, 6, 3, groups=6))
    text = write_weight_pictures(net, tmp_path / "weights.html").read_text()
    shapes = {name: pixels(a).shape[:2] for a, name in re.findall(r'<img src="([^"]+)" alt="([^"]+: filters)"', text)}
    assert shapes == {"0: filters": (1, 6 * 5 - 1), "1: filters": (3, 6 * 10 - 1)}


@pytest.mark.parametrize("net", [nn.Linear(3, 3), VisionTransformer(embed_dim=24, depth=1).to("meta")])
def test_network_without_anything_to_draw_is_refused(net: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(EspalierError, match=type(net).__name__):
        write_weight_pictures(net, tmp_path / "new" / "weights.html")
    assert not (tmp_path / "new").exists()
