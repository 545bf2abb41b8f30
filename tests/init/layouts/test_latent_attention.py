"""Multi-head latent attention of transformers: its products, read out of the real modules' forward passes."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import espalier
from espalier.init import LatentAttentionWeights, Skipped, fit
from espalier.init.layouts import find_layers
from reference.attention_probe import query_key_products, value_output_product

transformers = pytest.importorskip("transformers")

DIM, HEADS = 36, 3
SIZES: dict[str, Any] = {
    "hidden_size": DIM, "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "kv_lora_rank": 12,
    "q_lora_rank": 20, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 10, "num_hidden_layers": 1,
    "intermediate_size": 32,
}  # fmt: skip
INDEXER = {"index_n_heads": 2, "index_head_dim": 8, "index_topk": 64}
CLASSES: dict[str, dict[str, Any]] = {
    "axk1.modeling_axk1.AXK1Attention": {},
    "bailing_hybrid.modeling_bailing_hybrid.BailingHybridAttention": {},
    "deepseek_v2.modeling_deepseek_v2.DeepseekV2Attention": {},
    "deepseek_v3.modeling_deepseek_v3.DeepseekV3Attention": {},
    "deepseek_v32.modeling_deepseek_v32.DeepseekV32Attention": INDEXER,
    "dots3_note.modeling_dots3_note.Dots3NoteTextAttention": INDEXER,
    "glm4_moe_lite.modeling_glm4_moe_lite.Glm4MoeLiteAttention": {},
    "glm5_next.modeling_glm5_next.Glm5NextTextAttention": {
        **INDEXER,
        "qk_rope_head_dim": 0,
        "indexer_types": ["shared"],
    },
    "glm_moe_dsa.modeling_glm_moe_dsa.GlmMoeDsaAttention": INDEXER,
    "hy_v4.modeling_hy_v4.HYV4Attention": INDEXER,
    "kimi_linear.modeling_kimi_linear.KimiLinearAttention": {},
    "longcat_flash.modeling_longcat_flash.LongcatFlashMLA": {},
    "minicpm3.modeling_minicpm3.MiniCPM3Attention": {},
    "mistral4.modeling_mistral4.Mistral4Attention": {},
    "youtu.modeling_youtu.YoutuAttention": {},
}
V3 = "deepseek_v3.modeling_deepseek_v3.DeepseekV3Attention"
BOTH = espalier.Mimetic(qk=(0.0, 0.7), vo=(0.0, -0.4))


def build(path: str, **changes: Any) -> nn.Module:
    """Build an attention module by its path inside transformers.models, in float64."""
    place, _, name = path.rpartition(".")
    cls = getattr(importlib.import_module(f"transformers.models.{place}"), name)
    package = place.partition(".")[0]
    stated = inspect.signature(cls.__init__).parameters["config"].annotation
    known = importlib.import_module(f"transformers.models.{package}.configuration_{package}")
    config = getattr(known, stated if isinstance(stated, str) else stated.__name__)
    made = config(**{**SIZES, **CLASSES.get(path, {}), **changes}, attn_implementation="eager")
    return cls(made, layer_idx=0).double().eval()


def call(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Run a module with rotary positions that turn nothing, a mask that hides nothing and gates half open."""
    length, turned = x.shape[1], module.qk_rope_head_dim
    turns: Any = (torch.ones(1, length, turned).double(), torch.zeros(1, length, turned).double())
    if "V2Attention" in type(module).__name__:
        turns = torch.ones(1, length, turned // 2, dtype=torch.complex128)
    given = {
        "position_embeddings": turns,
        "position_ids": torch.arange(length)[None],
        "attention_mask": torch.zeros(len(x), 1, length, length).double(),
    }
    if getattr(module, "indexer", None) is None:  # it takes the tokens that an earlier layer picked: all of them
        given["prev_topk_indices"] = torch.arange(length).expand(len(x), length, length)
    taken = inspect.signature(module.forward).parameters
    out, maps = module(x, **{name: value for name, value in given.items() if name in taken})[:2]
    return out * (2 if hasattr(module, "g_proj") or hasattr(module, "gate_proj") else 1), maps


def still(module: nn.Module) -> None:
    """Take away what is not a product: shared rotary keys, the gates' slopes, sinks."""
    module.kv_a_proj_with_mqa.weight[module.kv_lora_rank :].zero_()
    for name in ("g_proj", "gate_proj"):
        if hasattr(module, name):
            getattr(module, name).weight.zero_()
    if hasattr(module, "sinks"):
        module.sinks.fill_(-1e4)


def token_factors(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Return for each unit vector how much more its query and its key-value latent is scaled up than in the mean."""

    def factors(down: Tensor, norm: nn.Module) -> Tensor:
        squares = down.square().mean(0)
        return (squares.sum() / (squares + norm.variance_epsilon)).sqrt()

    kv = factors(module.kv_a_proj_with_mqa.weight[: module.kv_lora_rank], module.kv_a_layernorm)
    if getattr(module, "q_proj", None) is not None:
        return torch.ones_like(kv), kv
    return factors(module.q_a_proj.weight, module.q_a_layernorm), kv


def products(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Return W_Q W_Kᵀ of every head, (H, d, d), and Σ_h W_V W_O, (d, d), from forward passes of unit vectors."""
    dim = module.o_proj.weight.shape[0]
    q_D, kv_D = token_factors(module)
    qk = query_key_products(lambda x: call(module, x), dim, module.scaling)
    vo = value_output_product(lambda x: call(module, x), dim)
    return qk / (q_D[:, None] * kv_D), vo / kv_D[:, None]


def views_of(module: nn.Module) -> LatentAttentionWeights:
    [(_, _, found)] = [row for row in find_layers(module) if row[2].kind == "attention"]
    assert isinstance(found, LatentAttentionWeights), found
    return found


def row_of(report: espalier.StructureReport) -> Any:
    [row] = [row for row in report.layers if row.kind == "attention"]
    return row


def disturb(module: nn.Module, seed: int = 0) -> None:
    """Give every view random values, and the norms gains from 0.5 to 1.5."""
    generator = torch.Generator().manual_seed(seed)
    views = views_of(module)
    for part in (views.q, views.k, views.v, views.out, views.kv_down, views.q_down):
        if part is not None:
            part.copy_(torch.randn(part.shape, generator=generator, dtype=torch.float64) / part.shape[-1] ** 0.5)
    for gain in filter(lambda part: part is not None, (views.kv_gain, views.q_gain)):
        gain.copy_(torch.rand(gain.shape, generator=generator, dtype=torch.float64) + 0.5)


def check_projections(module: nn.Module) -> None:
    """Assert that a layer written without noise shows 0.7 and −0.4 times projections of the ranks it can have."""
    views = views_of(module)
    rank_kv, inner = len(views.kv_down), views.v.shape[0] * views.v.shape[1]
    head = min(views.k.shape[1], rank_kv, views.q.shape[-1])
    qk_HDD, vo_DD = products(module)
    for product, rank in [*((qk / 0.7, head) for qk in qk_HDD), (vo_DD / -0.4, min(inner, rank_kv))]:
        torch.testing.assert_close(product @ product, product, atol=2e-4, rtol=0)
        torch.testing.assert_close(product, product.T, atol=2e-4, rtol=0)
        assert abs(float(product.trace()) - rank) < 1e-2


@pytest.mark.parametrize("path", CLASSES)
@torch.no_grad()
def test_views_and_products_are_those_of_the_forward_pass(path: str) -> None:
    module = build(path)
    still(module)
    disturb(module)
    views = views_of(module)
    kv = nn.functional.normalize(views.kv_down.flatten(), dim=0).view_as(views.kv_down) * len(views.kv_down) ** 0.5
    kv = kv * views.kv_gain[:, None] * views.scales[1]
    q = views.q
    if views.q_down is not None:
        down = views.q_down / views.q_down.norm() * len(views.q_down) ** 0.5
        q = q @ (down * views.q_gain[:, None] * views.scales[0])
    qk_HDD, vo_DD = products(module)
    torch.testing.assert_close(qk_HDD, q.mT @ (views.k @ kv), atol=1e-4, rtol=0)
    torch.testing.assert_close(vo_DD, (views.v @ kv).flatten(0, 1).T @ views.out.T, atol=1e-5, rtol=1e-5)
    row = row_of(espalier.audit(module))
    assert row.status == "absent"
    assert row.measured["qk_diagonal"] == pytest.approx(float(qk_HDD.diagonal(dim1=1, dim2=2).mean()), abs=1e-5)
    assert row.measured["vo_diagonal"] == pytest.approx(float(vo_DD.diagonal().mean()), abs=1e-5)
    assert "normalised" in row.note

    espalier.structure_(module, attention=BOTH, depthwise=None, generator=torch.Generator().manual_seed(1))
    check_projections(module)


@given(
    dim=st.integers(8, 24), heads=st.integers(1, 4), sizes=st.tuples(*[st.integers(1, 8)] * 2),
    rank_kv=st.integers(1, 24), rank_q=st.none() | st.integers(1, 24), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
@torch.no_grad()
def test_every_size_is_written_or_refused(
    dim: int, heads: int, sizes: tuple[int, int], rank_kv: int, rank_q: int | None, seed: int
) -> None:
    changes = {"hidden_size": dim, "num_attention_heads": heads, "num_key_value_heads": heads, "kv_lora_rank": rank_kv}
    changes |= {"q_lora_rank": rank_q, "qk_nope_head_dim": sizes[0], "v_head_dim": sizes[1]}
    module = build(V3, **changes)
    if max(rank_kv, rank_q or 0) > dim:
        [(_, _, found)] = list(find_layers(module))
        assert isinstance(found, Skipped)
        assert "wider" in found.reason
        return
    still(module)
    disturb(module, seed)
    espalier.structure_(module, attention=BOTH, generator=torch.Generator().manual_seed(seed))
    check_projections(module)


@pytest.mark.parametrize("rank_q", [None, 40, 12])
@pytest.mark.parametrize("parts", [{}, {"qk": None}, {"vo": None}])
@torch.no_grad()
def test_only_what_is_asked_for_is_written(parts: dict[str, None], rank_q: int | None) -> None:
    module = build(V3, hidden_size=96, kv_lora_rank=20, q_lora_rank=rank_q, attention_bias=True)
    disturb(module)
    module.kv_a_proj_with_mqa.weight[:20] *= 37  # the norm takes this out
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            parameter.fill_(0.3)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    views = views_of(module)
    qk, vo = [views.q.clone(), views.k.clone()], [views.v.clone(), views.out.clone()]
    spec = espalier.Mimetic(**parts)
    row = row_of(espalier.structure_(module, attention=spec, generator=torch.Generator().manual_seed(0)))
    assert row.status == "written"
    assert "biases are left" in row.note
    views = views_of(module)
    assert [torch.equal(*pair) for pair in zip((views.q, views.k), qk, strict=True)] == ["qk" in parts] * 2
    assert [torch.equal(*pair) for pair in zip((views.v, views.out), vo, strict=True)] == ["vo" in parts] * 2
    after = module.state_dict()
    for name, value in before.items():
        if name.endswith("bias") or "norm" in name:
            assert torch.equal(after[name], value), name
    assert torch.equal(after["kv_a_proj_with_mqa.weight"][20:], before["kv_a_proj_with_mqa.weight"][20:])
    name = "q_proj.weight" if rank_q is None else "q_b_proj.weight"
    rotary = [weight[name].unflatten(0, (HEADS, -1))[:, 8:] for weight in (before, after)]
    assert torch.equal(*rotary)
    if parts:
        assert torch.equal(after["kv_a_proj_with_mqa.weight"], before["kv_a_proj_with_mqa.weight"])
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
    still(module)
    qk_HDD, vo_DD = products(module)
    if "qk" not in parts:
        assert float(qk_HDD.diagonal(dim1=1, dim2=2).sum(1).min()) > 0.5 * 0.7 * 8
    if "vo" not in parts:
        assert float(vo_DD.trace()) == pytest.approx(-0.4 * 20, rel=0.15)


@pytest.mark.parametrize("rank_q", [None, 96])
@torch.no_grad()
def test_scores_of_normal_tokens_have_the_size_of_the_products(rank_q: int | None) -> None:
    """The norms' rescaling is 1 in the mean: over tokens of unit variance the forward pass shows what is reported."""
    dim = 256
    module = build(V3, hidden_size=dim, kv_lora_rank=64, q_lora_rank=rank_q, qk_nope_head_dim=32, v_head_dim=32)
    still(module)
    measured = row_of(espalier.structure_(module, generator=torch.Generator().manual_seed(0))).measured
    x = torch.randn(1, 128, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = torch.cat([x, torch.zeros_like(x[:, :1])], 1)
    logs = call(module, x)[1][0].double().log()
    own = (logs.diagonal(dim1=1, dim2=2) - logs[..., -1])[:, :-1] / module.scaling
    assert float(own.mean()) / dim == pytest.approx(measured["qk_diagonal"], rel=0.1)
    alone = x[0, :-1, None]
    along = (call(module, alone)[0] * alone).sum(-1).mean() / dim
    assert float(along) == pytest.approx(measured["vo_diagonal"], rel=0.1)


@pytest.mark.parametrize("rank_q", [None, 48])
@torch.no_grad()
def test_audit_names_the_lost_product_and_fit_finds_the_strengths(rank_q: int | None) -> None:
    sizes = {"hidden_size": 192, "kv_lora_rank": 40, "q_lora_rank": rank_q, "qk_nope_head_dim": 16, "v_head_dim": 16}
    module = build(V3, **sizes)
    assert row_of(espalier.audit(module)).status == "absent"
    spec = espalier.Mimetic(qk=(0.5, 0.8), vo=(0.3, -0.5))
    report = espalier.structure_(module, attention=spec, generator=torch.Generator().manual_seed(0), guard=True)
    assert row_of(espalier.audit(module, against=report)).status == "present"
    [found] = fit(module).rows["attention"]
    for pair, asked in ((found.qk_asked, spec.qk), (found.vo_asked, spec.vo)):
        assert pair == pytest.approx(asked, rel=0.15)
    spec_again = fit(module).specs()["attention"]
    again = espalier.structure_(build(V3, **sizes), attention=spec_again, generator=torch.Generator().manual_seed(1))
    for figure in ("qk_diagonal", "vo_diagonal"):
        assert row_of(again).measured[figure] == pytest.approx(row_of(report).measured[figure], rel=0.15)
    module.o_proj.weight.neg_()
    assert "vo (its sign is the other)" in row_of(espalier.audit(module, against=report)).note
    module.o_proj.weight.neg_()
    queries = module.q_proj if rank_q is None else module.q_b_proj
    nn.init.normal_(queries.weight, generator=torch.Generator().manual_seed(2))
    assert row_of(espalier.audit(module, against=report)).note.endswith("lost: qk")


def test_forms_that_no_layout_knows_are_skipped() -> None:
    for path in (
        "axk2.modeling_axk2.AXK2Attention",
        "mistral_large4.modeling_mistral_large4.MistralLarge4TextAttention",
    ):
        found = [row[2] for row in find_layers(build(path, **INDEXER)) if row[2].kind == "attention"]
        assert [type(weights) for weights in found] == [Skipped]
        assert "no layout knows" in found[0].reason

    module = build(V3)
    own = type(
        "OwnAttention", (type(module),), {"expand_kv": lambda self, kv, k: super(type(self), self).expand_kv(kv, k)}
    )
    module.__class__ = own
    [(_, _, found)] = list(find_layers(module))
    assert isinstance(found, Skipped)
    assert "not registered" in found.reason


@torch.no_grad()
def test_a_latent_without_rank_fails_by_name_and_is_replaced_where_both_are_asked() -> None:
    model = nn.ModuleDict({"whole": build(V3), "lost": build(V3)})
    model["lost"].kv_a_proj_with_mqa.weight[3].zero_()
    rows = espalier.structure_(model, attention=espalier.Mimetic(qk=None)).layers
    assert {row.layer: row.status for row in rows} == {"whole": "written", "lost": "failed"}
    assert "lost directions" in rows[1].note
    assert [row.status for row in espalier.structure_(model).layers] == ["written", "written"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_whole_model_is_written_in_its_own_type(dtype: torch.dtype) -> None:
    config = transformers.DeepseekV3Config(
        **{**SIZES, "hidden_size": 48, "num_hidden_layers": 2}, vocab_size=50, n_routed_experts=4, n_group=1,
        topk_group=1,
        num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=1,
    )  # fmt: skip
    model = transformers.DeepseekV3ForCausalLM(config).to(dtype)
    report = espalier.structure_(model, generator=torch.Generator().manual_seed(0))
    assert [row.status for row in report.layers] == ["written"] * 2
    assert espalier.audit(model, against=report).ok
    assert model(torch.arange(7)[None]).logits.isfinite().all()
