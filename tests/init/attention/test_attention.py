"""Mimetic attention on tensors: the papers' table of variants, exact products, grouped queries, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.errors import EspalierError
from espalier.init.attention.mimetic import Mimetic, measure_attention, mimetic_attention_, truncated
from reference.attention_reference import head_products, off_diagonal_std, value_output_product


def weights(dim: int, heads: int, groups: int | None = None, width: int | None = None) -> list[torch.Tensor]:
    width, groups = width or dim // heads, groups or heads
    return [torch.empty(heads * width, dim), torch.empty(groups * width, dim), torch.empty(groups * width, dim),
            torch.empty(dim, heads * width)]  # fmt: skip


# (d, H): mean diagonal and off-diagonal deviation of W_Q W_Kᵀ, deviation of W_Q and of W_V, VO diagonal and deviation.
TABLE = {
    (192, 3): (0.395, 0.0517, 0.0857, 0.0510, -0.400, 0.0288),
    (384, 6): (0.222, 0.0306, 0.0639, 0.0361, -0.400, 0.0204),
    (768, 12): (0.119, 0.0168, 0.0465, 0.0255, -0.400, 0.0144),
}


@pytest.mark.parametrize(("dim", "heads"), TABLE)
def test_published_statistics_within_three_per_cent(dim: int, heads: int) -> None:
    rows = []
    for seed in range(3):
        q, k, v, out = weights(dim, heads)
        mimetic_attention_(q, k, v, out, heads, generator=torch.Generator().manual_seed(seed))
        products = head_products(q, k, heads)
        vo = value_output_product(v, out)
        rows.append([
            sum(float(p.diagonal().mean()) for p in products) / heads,
            sum(off_diagonal_std(p) for p in products) / heads,
            float(q.std()), float(v.std()), float(vo.diagonal().mean()), off_diagonal_std(vo),
        ])  # fmt: skip
    means = torch.tensor(rows).mean(0)
    torch.testing.assert_close(means, torch.tensor(TABLE[dim, heads]), rtol=0.03, atol=0)


@settings(deadline=None, max_examples=15)
@given(heads=st.integers(1, 4), width=st.integers(2, 12), seed=st.integers(0, 50))
def test_value_output_product_is_exactly_the_drawn_matrix(heads: int, width: int, seed: int) -> None:
    dim = heads * width
    q, k, v, out = weights(dim, heads)
    # Without noise the product must be β I to rounding, in the convention in which modules apply the weights.
    mimetic_attention_(q, k, v, out, heads, vo=(0.0, -0.4), generator=torch.Generator().manual_seed(seed))
    x = torch.randn(5, dim, generator=torch.Generator().manual_seed(seed))
    through = torch.nn.functional.linear(torch.nn.functional.linear(x, v), out)
    torch.testing.assert_close(through, -0.4 * x, atol=1e-5, rtol=0)


def test_product_keeps_its_orientation() -> None:
    # A transposed realisation has the same diagonal; only a known, unsymmetric target can tell.
    q, k, v, out = weights(24, 2)
    mimetic_attention_(q, k, v, out, 2, qk=None, generator=torch.Generator().manual_seed(5))
    from espalier.init.attention.near_identity import near_identity

    target = near_identity(24, 0.4, -0.4, generator=torch.Generator().manual_seed(5)).double()
    torch.testing.assert_close(value_output_product(v, out), target, atol=1e-5, rtol=0)
    assert not torch.allclose(target, target.T, atol=0.05)


def test_none_leaves_a_pair_alone() -> None:
    tensors = [torch.full_like(t, 7.0) for t in weights(16, 2)]
    mimetic_attention_(*tensors, 2, qk=None)
    assert (tensors[0] == 7).all()
    assert (tensors[1] == 7).all()
    assert not (tensors[2] == 7).any()


@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (4, 1), (6, 3)])
def test_grouped_queries_keep_every_head_near_the_identity(heads: int, groups: int) -> None:
    dim, width = 96, 96 // heads
    q, k, v, out = weights(dim, heads, groups)
    mimetic_attention_(q, k, v, out, heads, num_kv_heads=groups, generator=torch.Generator().manual_seed(0))
    for head in range(heads):
        group = head // (heads // groups)
        w_q = q[head * width : (head + 1) * width].double().T
        w_k = k[group * width : (group + 1) * width].double().T
        product = w_q @ w_k.T
        # The projection of βI on k of d directions has diagonal mean βk/d: no head falls below most of that.
        assert float(product.diagonal().mean()) > 0.8 * 0.7 * width / dim
    total = torch.zeros(dim, dim, dtype=torch.float64)
    for head in range(heads):
        group = head // (heads // groups)
        w_v = v[group * width : (group + 1) * width].double().T
        total += w_v @ out[:, head * width : (head + 1) * width].double().T
    expected = truncated(0.4, -0.4, groups * width / dim)[1]
    assert float(total.diagonal().mean()) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("width", [4, 40])
def test_head_width_need_not_be_the_models_share(width: int) -> None:
    heads, dim = 3, 24
    q, k, v, out = weights(dim, heads, width=width)
    mimetic_attention_(q, k, v, out, heads, generator=torch.Generator().manual_seed(0))
    vo = value_output_product(v, out)
    expected = truncated(0.4, -0.4, min(heads * width / dim, 1.0))[1]
    assert float(vo.diagonal().mean()) == pytest.approx(expected, abs=0.1)
    assert torch.isfinite(q).all()


@settings(deadline=None, max_examples=10)
@given(heads=st.sampled_from([1, 2, 4]), groups=st.sampled_from([1, 2]), seed=st.integers(0, 9))
def test_measure_equals_explicit_products(heads: int, groups: int, seed: int) -> None:
    groups = min(heads, groups)
    generator = torch.Generator().manual_seed(seed)
    q, k, v, out = (torch.randn(t.shape, generator=generator) for t in weights(16, heads, groups))
    measured = measure_attention(q, k, v, out, heads, groups)
    shared, width = heads // groups, 16 // heads
    k_all = k.reshape(groups, width, 16).repeat_interleave(shared, 0).reshape(-1, 16)
    v_all = v.reshape(groups, width, 16).repeat_interleave(shared, 0).reshape(-1, 16)
    products = head_products(q, k_all, heads)
    vo = value_output_product(v_all, out)
    off = torch.stack([p - torch.diag(p.diagonal()) for p in products]).square().sum() / (heads * 16 * 15)
    assert measured["qk_diagonal"] == pytest.approx(
        float(torch.stack([p.diagonal() for p in products]).mean()), abs=1e-5
    )
    assert measured["qk_off"] == pytest.approx(float(off.sqrt()), rel=1e-4)
    assert measured["vo_diagonal"] == pytest.approx(float(vo.diagonal().mean()), abs=1e-5)


def test_half_precision_weights_hold_the_rounded_float32_values() -> None:
    single, half = weights(32, 2), [t.bfloat16() for t in weights(32, 2)]
    mimetic_attention_(*single, 2, generator=torch.Generator().manual_seed(0))
    mimetic_attention_(*half, 2, generator=torch.Generator().manual_seed(0))
    for a, b in zip(single, half, strict=True):
        assert torch.equal(a.bfloat16(), b)


def test_meta_is_a_no_op() -> None:
    tensors = [t.to("meta") for t in weights(32, 2)]
    mimetic_attention_(*tensors, 2)
    assert all(t.is_meta for t in tensors)


def test_bad_input_is_one_line() -> None:
    q, k, v, out = weights(30, 3)
    with pytest.raises(EspalierError, match="num_heads 4 does not divide"):
        mimetic_attention_(q, k, v, out, 4)
    with pytest.raises(EspalierError, match="num_kv_heads 2 does not divide num_heads 3"):
        mimetic_attention_(q, k, v, out, 3, num_kv_heads=2)
    with pytest.raises(EspalierError, match="num_kv_heads 0 does not divide"):
        mimetic_attention_(q, k, v, out, 3, num_kv_heads=0)
    with pytest.raises(EspalierError, match=r"torch\.int64"):
        mimetic_attention_(q, k.long(), v, out, 3)
    with pytest.raises(EspalierError, match="out has shape"):
        measure_attention(q, k, v, out[:7], 3)
    with pytest.raises(EspalierError, match=r"out has shape \(7, 30\)"):
        mimetic_attention_(q, k, v, torch.empty(7, 30), 3)
    with pytest.raises(EspalierError, match="did you mean 'vision'"):
        Mimetic.preset("visionn")


@pytest.mark.parametrize("changes", [
    {"qk": 0.7}, {"vo": -0.4}, {"qk": (math.nan, 0.7)}, {"vo": (0.4, math.inf)}, {"qk": ("a", "b")}, {"qk": "07"},
    {"qk": (1.0, 2.0, 3.0)}, {"noise": "x"}, {"method": "x"}, {"layers": ((0.7, 0.7),)},
    {"layers": (((0.7, 0.7), None),)},
])  # fmt: skip
def test_strengths_that_are_no_two_numbers_are_refused_before_anything_is_written(changes: dict[str, object]) -> None:
    name = next(iter(changes))
    with pytest.raises(EspalierError, match=rf"^(unknown )?{name}"):
        Mimetic(**changes)  # type: ignore[arg-type]
    if name != "layers":
        parts = weights(24, 2)
        for part in parts:
            part.fill_(1.0)
        with pytest.raises(EspalierError, match=rf"^(unknown )?{name}"):
            mimetic_attention_(*parts, 2, **changes)  # type: ignore[arg-type]
        assert all(bool((part == 1).all()) for part in parts)
