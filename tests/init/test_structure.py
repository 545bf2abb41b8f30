"""``structure_`` and ``audit`` on whole models: found, written, verified, lost."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import espalier
from espalier.errors import EspalierError
from espalier.init import StructureReport, VerificationError
from espalier.init.families.attention import AttentionFamily
from espalier.init.filters.spec import FilterCovariance
from espalier.init.filters.statistics import FilterStatistics, LayerStatistics
from espalier.init.layouts import AttentionWeights
from espalier.models import ConvMixer, VisionTransformer
from espalier.nn.ssm.mamba import Mamba1
from reference.attention_reference import head_products, value_output_product


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_vit() -> VisionTransformer:
    return VisionTransformer(img_size=8, patch_size=2, in_chans=1, embed_dim=48, depth=3, num_heads=3)


def statuses(report: StructureReport) -> list[str]:
    return [row.status for row in report.layers]


def test_multihead_attention_maps_values_as_asked_through_its_own_forward() -> None:
    # With one token the attention map is 1, so the module's output is x W_V W_proj, whatever its storage looks like.
    layer = nn.MultiheadAttention(32, 4, batch_first=True)
    nn.init.normal_(layer.in_proj_bias)
    espalier.structure_(layer, attention=espalier.Mimetic(vo=(0.0, -0.4)), generator=seeded())
    x = torch.randn(7, 1, 32, generator=seeded(1))
    out, _ = layer(x, x, x)
    torch.testing.assert_close(out, -0.4 * x, atol=1e-5, rtol=0)


def test_encoder_layer_attends_to_equal_tokens() -> None:
    # Logits are x_i W_Q W_Kᵀ x_jᵀ / √k: without noise and at full rank they are 0.7 x_i·x_j / √k.
    layer = nn.MultiheadAttention(16, 1, batch_first=True)
    espalier.structure_(layer, attention=espalier.Mimetic(qk=(0.0, 0.7)), generator=seeded())
    x = torch.randn(2, 5, 16, generator=seeded(1))
    _, maps = layer(x, x, x)
    torch.testing.assert_close(maps, (0.7 * x @ x.mT / 4).softmax(-1), atol=1e-5, rtol=0)


def test_own_model_attends_to_equal_tokens_and_maps_values() -> None:
    net = VisionTransformer(img_size=4, patch_size=1, in_chans=1, embed_dim=16, depth=1, num_heads=1)
    espalier.structure_(net, attention=espalier.Mimetic(qk=(0.0, 0.7), vo=(0.0, -0.4)), generator=seeded())
    attention = net.blocks[0].attn
    x = torch.randn(2, 5, 16, generator=seeded(1))
    maps = (0.7 * x @ x.mT / 4).softmax(-1)
    torch.testing.assert_close(attention(x), -0.4 * maps @ x, atol=1e-5, rtol=0)
    torch.testing.assert_close(attention.maps(x)[:, 0], maps, atol=1e-5, rtol=0)


def test_every_family_is_written_in_module_order_and_biases_are_zeroed() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixer = nn.Conv2d(32, 32, 7, groups=32, padding=3)
            self.plain = nn.Conv2d(32, 32, 3)
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, batch_first=True), 2)

    model = Both()
    nn.init.ones_(model.encoder.layers[0].self_attn.in_proj_bias)
    plain, bias = model.plain.weight.clone(), model.mixer.bias.clone()
    report = espalier.structure_(model, generator=seeded())
    assert [row.layer for row in report.layers] == [
        "mixer", "encoder.layers.0.self_attn", "encoder.layers.1.self_attn"
    ]  # fmt: skip
    assert statuses(report) == ["written"] * 3
    assert not model.encoder.layers[0].self_attn.in_proj_bias.any()
    assert torch.equal(model.plain.weight, plain)
    assert torch.equal(model.mixer.bias, bias)


def test_audit_tells_present_from_absent_from_lost() -> None:
    net = small_vit()
    assert statuses(espalier.audit(net)) == ["absent"] * 3
    report = espalier.structure_(net, generator=seeded())
    assert statuses(espalier.audit(net)) == ["present"] * 3
    assert espalier.audit(net, against=report).ok
    nn.init.xavier_uniform_(net.blocks[1].attn.qkv.weight)
    after = espalier.audit(net, against=report)
    assert statuses(after) == ["present", "lost", "present"]
    assert not after.ok


@pytest.mark.parametrize("seed", range(5))
def test_audit_of_filters_tells_default_from_structured(seed: int) -> None:
    net = ConvMixer(64, 3, kernel_size=5, patch_size=2, in_chans=1, num_classes=10)
    net.init_weights(seeded(seed))
    assert statuses(espalier.audit(net)) == ["absent"] * 3
    espalier.structure_(net, generator=seeded(seed))
    assert statuses(espalier.audit(net)) == ["present"] * 3


def test_audit_sees_through_wrappers_and_misses_removed_layers() -> None:
    net = small_vit()
    report = espalier.structure_(net, generator=seeded())
    wrapped = torch.compile(net)
    assert espalier.audit(wrapped, against=report).ok
    net.blocks = net.blocks[:2]
    after = espalier.audit(net, against=report)
    assert statuses(after) == ["present", "present", "lost"]
    assert after.layers[-1].note == "the layer is gone"


def test_products_are_what_the_report_says() -> None:
    net = small_vit()
    row = espalier.structure_(net, generator=seeded()).layers[1]
    q, k, v = net.blocks[1].attn.qkv.weight.detach().chunk(3)
    products = head_products(q, k, 3)
    diagonal = sum(float(p.diagonal().mean()) for p in products) / 3
    assert row.measured["qk_diagonal"] == pytest.approx(diagonal, abs=1e-6)
    vo = value_output_product(v, net.blocks[1].attn.proj.weight.detach())
    assert row.measured["vo_diagonal"] == pytest.approx(float(vo.diagonal().mean()), abs=1e-6)


def test_generator_decides_everything_and_layers_draw_apart() -> None:
    one, two = small_vit(), small_vit()
    state = torch.random.get_rng_state()
    espalier.structure_(one, generator=seeded(3))
    espalier.structure_(two, generator=seeded(3))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(one.blocks[2].attn.qkv.weight, two.blocks[2].attn.qkv.weight)
    assert not torch.equal(one.blocks[0].attn.qkv.weight, one.blocks[1].attn.qkv.weight)
    # A layer's own stream: the third is the same when the strengths of all change the number of draws of none.
    espalier.structure_(two, attention=espalier.Mimetic(qk=None), generator=seeded(3))
    assert torch.equal(one.blocks[2].attn.qkv.weight[:96], two.blocks[2].attn.qkv.weight[:96])


def test_layers_that_share_some_weights_are_written_once() -> None:
    model = nn.ModuleList([nn.MultiheadAttention(32, 2) for _ in range(4)])
    model[1].in_proj_weight = model[0].in_proj_weight
    model[3].out_proj.weight = model[2].out_proj.weight
    before = [model[index].out_proj.weight.clone() for index in (1, 3)]
    report = espalier.structure_(model, generator=seeded())
    assert statuses(report) == ["written", "skipped", "written", "skipped"]
    assert [row.note for row in report.layers][1::2] == [
        f"some of its weights are those of {first}, which is written" for first in (0, 2)
    ]
    assert torch.equal(model[1].out_proj.weight, before[0])
    assert [row.status for row in espalier.audit(model).layers][::2] == ["present", "present"]


def test_a_write_that_does_not_stay_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model, write = nn.ModuleList([nn.MultiheadAttention(32, 2)]), AttentionFamily.write

    def undone(family: AttentionFamily, weights: AttentionWeights, *args: Any) -> str:
        before = weights.q.clone()
        text = write(family, weights, *args)
        weights.q.copy_(before)
        return text

    monkeypatch.setattr(AttentionFamily, "write", undone)
    with pytest.raises(VerificationError, match=r"layer '0': qk diagonal is .* where .* was written"):
        espalier.structure_(model, generator=seeded())


def test_meta_is_skipped_and_can_be_run_again() -> None:
    with torch.device("meta"):
        net = small_vit()
    report = espalier.structure_(net, generator=seeded())
    assert statuses(report) == ["skipped"] * 3
    assert "meta" in report.layers[0].note
    net.to_empty(device="cpu").init_weights(seeded())
    reference = small_vit()
    reference.init_weights(seeded())
    for model in (net, reference):
        espalier.structure_(model, generator=seeded(7))
    for (name, a), (_, b) in zip(net.state_dict().items(), reference.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(net.pos_embed, reference.pos_embed)


def test_cross_attention_and_parametrised_weights_are_left_alone_and_said_so() -> None:
    decoder = nn.TransformerDecoderLayer(32, 2)
    before = decoder.multihead_attn.in_proj_weight.clone()
    report = espalier.structure_(decoder, generator=seeded())
    assert statuses(report) == ["written", "skipped"]
    assert "cross-attention" in report.layers[1].note
    assert torch.equal(decoder.multihead_attn.in_proj_weight, before)

    conv = parametrizations.weight_norm(nn.Conv2d(8, 8, 3, groups=8))
    with pytest.raises(EspalierError, match="parametrised"):
        espalier.structure_(nn.Sequential(conv))


def test_a_model_without_a_place_for_structure_is_refused_in_one_line() -> None:
    with pytest.raises(EspalierError, match="Sequential has no attention or ssm or depthwise layer") as caught:
        espalier.structure_(nn.Sequential(nn.Linear(3, 3), nn.Conv2d(3, 3, 3)))
    assert "\n" not in str(caught.value)
    with pytest.raises(EspalierError, match="no attention or ssm layer"):
        espalier.structure_(ConvMixer(8, 1, 3, 2), depthwise=None)


def test_report_prints_as_a_table_and_survives_json() -> None:
    report = espalier.structure_(small_vit(), generator=seeded())
    again = StructureReport.from_dict(json.loads(json.dumps(report.to_dict())))
    assert str(again) == str(report)
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "kind", "host", "status", "asked", "measured"]
    assert len(lines) == 2 + 3
    assert "blocks.0.attn" in lines[2]
    assert "0.7·Z +0.7·I" in lines[2]


def test_users_can_register_a_layout() -> None:
    class Separate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wq, self.wk, self.wv, self.wo = (nn.Linear(24, 24, bias=False) for _ in range(4))

    @espalier.init.register_layout(Separate)
    def separate(module: Separate) -> espalier.init.AttentionWeights:
        parts = (module.wq, module.wk, module.wv, module.wo)
        return espalier.init.AttentionWeights(*(part.weight.detach() for part in parts), 3, 3)

    model = nn.Sequential(Separate(), Separate())
    twin = copy.deepcopy(model)
    report = espalier.structure_(model, generator=seeded())
    assert statuses(report) == ["written", "written"]
    assert not torch.equal(model[0].wq.weight, twin[0].wq.weight)
    x = torch.randn(3, 24, generator=seeded(2))
    espalier.structure_(model, attention=espalier.Mimetic(vo=(0.0, -0.4)), generator=seeded())
    torch.testing.assert_close(model[0].wo(model[0].wv(x)), -0.4 * x, atol=1e-5, rtol=0)


def test_modules_with_the_very_same_weights_are_written_once() -> None:
    first, second = (nn.MultiheadAttention(24, 3, batch_first=True) for _ in range(2))
    for name, parameter in list(first.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        second.get_submodule(owner).register_parameter(leaf, parameter)
    report = espalier.structure_(nn.ModuleDict({"first": first, "second": second, "own": copy.deepcopy(second)}))
    assert [row.status for row in report.layers] == ["written", "skipped", "written"]
    assert "those of first" in report.layers[1].note
    q, k, _ = second.in_proj_weight.detach().chunk(3)
    assert head_products(q, k, 3)[0].diagonal().mean() > 0.2


@pytest.mark.parametrize(("name", "value"), [
    ("attention", "vision"), ("attention", (0.7, 0.7)), ("attention", espalier.MimeticSSM()), ("ssm", 1),
    ("depthwise", "closed-form"), ("generator", 0),
])  # fmt: skip
def test_an_argument_of_another_kind_is_named_with_the_remedy(name: str, value: object) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 16, batch_first=True)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(EspalierError, match=rf"^{name} is .*: give a "):
        espalier.structure_(layer, **{name: value})  # type: ignore[arg-type]
    assert all(torch.equal(tensor, before[key]) for key, tensor in layer.state_dict().items())


def measured_over(sizes: tuple[int, ...], covariance: torch.Tensor) -> FilterCovariance:
    return FilterCovariance(statistics=FilterStatistics((LayerStatistics("a", sizes, covariance, 8, 0.0),)))


@pytest.mark.parametrize(
    "spec",
    [
        {"ssm": espalier.MimeticSSM(layers=(0, 5))},
        {"ssm": espalier.MimeticSSM(convolution="covariance")},
        {"depthwise": measured_over((5, 5), torch.eye(25, dtype=torch.float64))},
        {"depthwise": measured_over((5,), -torch.eye(5, dtype=torch.float64))},
    ],
)
def test_a_spec_that_one_layer_refuses_leaves_the_others_as_they_were(spec: dict[str, Any]) -> None:
    attention, filters = nn.MultiheadAttention(32, 2), nn.Conv1d(32, 32, 5, groups=32, padding=2)
    model = nn.Sequential(attention, Mamba1(32, 4, conv_size=2), filters)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(EspalierError, match=r"^layer '[12]'"):
        espalier.structure_(model, generator=seeded(), **spec)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
