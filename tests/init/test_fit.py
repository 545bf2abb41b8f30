"""Strengths read off weights are those that were written, through truncation, layers and depths."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from torch import nn

import espalier
from espalier.errors import EspalierError
from espalier.init import Mimetic, StructureFit, fit
from espalier.init.families.attention import strength_behind
from espalier.models import VisionTransformer
from reference.attention_reference import head_products, off_diagonal_std, value_output_product


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def vit(depth: int = 2, dim: int = 192, heads: int = 3) -> VisionTransformer:
    return VisionTransformer(img_size=8, patch_size=4, embed_dim=dim, depth=depth, num_heads=heads)


def test_least_squares_of_every_head_and_of_values() -> None:
    model = vit()
    nn.init.normal_(model.blocks[1].attn.qkv.weight, mean=0.01, std=0.1, generator=seeded())
    row = fit(model).rows["attention"][1]
    attention = model.blocks[1].attn
    q, k, v = attention.qkv.weight.detach().chunk(3)
    products = [*head_products(q, k, 3), value_output_product(v, attention.proj.weight.detach())]
    for (alpha, beta), product in zip([*row.qk_heads, row.vo], products, strict=True):
        assert beta == pytest.approx(float(product.diagonal().mean()), abs=1e-6)
        rest = product - torch.diag(product.diagonal())
        assert alpha == pytest.approx(float((rest.square().sum() / (192 * 191)).sqrt()) * 192**0.5, rel=1e-4)
        assert alpha == pytest.approx(off_diagonal_std(product) * 192**0.5, rel=0.5)


@pytest.mark.parametrize("qk", [(0.7, 0.7), (0.3, 0.9), (0.9, -0.2), (0.5, 0.05)])
@pytest.mark.parametrize(("dim", "heads"), [(192, 3), (256, 8)])
def test_what_was_asked_for_is_found_behind_the_truncation(qk: tuple[float, float], dim: int, heads: int) -> None:
    model = vit(1, dim, heads)
    espalier.structure_(model, attention=Mimetic(qk=qk, vo=(0.3, -0.5)), generator=seeded(1))
    row = fit(model).rows["attention"][0]
    assert row.qk_asked == pytest.approx(qk, abs=0.06)
    assert row.vo_asked == pytest.approx((0.3, -0.5), abs=0.03)


def test_strengths_beyond_any_truncation_are_identity_alone() -> None:
    alpha, beta = strength_behind((0.0, 0.2), 0.25)
    assert alpha == pytest.approx(0.0, abs=1e-6)
    assert beta > 0.2
    assert strength_behind((0.4, -0.4), 1.0) == (0.4, -0.4)
    # The angle must rise along the table, or a fit would not be unique.
    betas = [strength_behind((0.5, b), 1 / 3)[1] for b in torch.linspace(0, 0.6, 13).tolist()]
    assert all(a <= b for a, b in pairwise(betas))


@pytest.mark.parametrize(("dim", "heads"), [(24, 3), (64, 8), (64, 1)])
def test_the_identity_alone_is_asked_for_at_its_own_strength(dim: int, heads: int) -> None:
    model = nn.Sequential(nn.MultiheadAttention(dim, heads))
    espalier.structure_(model, attention=Mimetic(qk=(0.0, 0.7), vo=(0.0, -0.4)), generator=seeded(1))
    [row] = fit(model).rows["attention"]
    assert row.qk_asked == pytest.approx((0.0, 0.7), abs=1e-3)
    assert row.vo_asked == pytest.approx((0.0, -0.4), abs=1e-3)


def test_a_model_of_another_width_and_depth_is_started_like_this_one() -> None:
    rising = Mimetic(layers=tuple(((0.7, 0.2 + 0.2 * i), (0.4, -0.1 - 0.2 * i)) for i in range(3)))
    teacher = vit(3)
    espalier.structure_(teacher, attention=rising, generator=seeded())
    found = StructureFit.from_dict(json.loads(json.dumps(fit(teacher).to_dict())))
    assert found == fit(teacher)
    student = vit(5, 96, 2)
    report = espalier.structure_(student, attention=found.specs()["attention"], generator=seeded(3))
    diagonals = [row.measured["vo_diagonal"] for row in report.layers]
    assert diagonals == pytest.approx([-0.1, -0.2, -0.3, -0.4, -0.5], abs=0.05)
    assert str(found).count("ask for") == 4
    assert "guessed" not in str(report)


def test_per_layer_strengths_interpolate_over_fractional_depth() -> None:
    spec = Mimetic(layers=(((0.0, 0.0), (1.0, 1.0)), ((1.0, 2.0), (0.0, -1.0))))
    assert spec.at(0, 5).qk == (0.0, 0.0)
    assert spec.at(4, 5).vo == (0.0, -1.0)
    assert spec.at(2, 5) == Mimetic(qk=(0.5, 1.0), vo=(0.5, 0.0))
    assert spec.at(0, 1).qk == (0.0, 0.0)
    assert Mimetic().at(3, 5) == Mimetic()
    assert Mimetic.preset("vision", layers=[[[0.1, 0.2], [0.3, 0.4]]]).layers == (((0.1, 0.2), (0.3, 0.4)),)


def test_a_model_without_structured_layers_is_refused() -> None:
    with pytest.raises(EspalierError, match="Linear has no structure to fit"):
        fit(nn.Linear(8, 8))


@pytest.mark.parametrize(
    "change",
    [{"sigma": None}, {"error": {}}, {"error": float("nan")}, {"sigma": "x"}, {"white_error": [1.0]}, {"sigma": True},
     {"more": 1.0}, {"sigma": 10**400}],
)  # fmt: skip
def test_values_that_no_fit_has_are_refused(change: dict[str, object]) -> None:
    row = {"layer": "mixer", "sigma": 2.0, "error": 0.1, "white_error": 0.4}
    assert StructureFit.from_dict({"depthwise": [row]}).specs()["depthwise"] is not None
    with pytest.raises((TypeError, ValueError)):
        StructureFit.from_dict({"depthwise": [row | change]})


def test_filters_that_are_all_equal_ask_for_nothing_also_from_a_file() -> None:
    model = nn.Sequential(*(nn.Conv2d(16, 16, 5, groups=16) for _ in range(3)))
    nn.init.constant_(model[1].weight, 0.04)
    found = fit(model)
    kept = StructureFit.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False)))
    assert [row.layer for row in kept.rows["depthwise"]] == ["0", "2"]
    asked, read = (fitted.specs()["depthwise"] for fitted in (found, kept))
    assert [read.sigma0, read.v, read.a] == pytest.approx([asked.sigma0, asked.v, asked.a])  # least squares
    nn.init.constant_(model[0].weight, 1.0)
    nn.init.constant_(model[2].weight, 1.0)
    assert StructureFit.from_dict(fit(model).to_dict()).specs()["depthwise"] is None


def test_a_model_without_storage_is_refused_in_one_line() -> None:
    for layer in (nn.MultiheadAttention(16, 2, device="meta"), nn.Conv2d(8, 8, 5, groups=8, device="meta")):
        with pytest.raises(EspalierError, match="is on the meta device: load its weights"):
            fit(layer)
