"""Models that were wrapped, tied, adapted or compiled after they were built: nothing changes but what a report says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import espalier
from espalier.errors import EspalierError
from espalier.models import ConvMixer, SequenceModel, VisionTransformer

DIM = 32


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def vit() -> VisionTransformer:
    return VisionTransformer(img_size=8, patch_size=4, embed_dim=DIM, depth=2, num_heads=2, num_classes=3)


def encoder(depth: int = 2) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(DIM, 2, 2 * DIM, batch_first=True)
    return nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)


def copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict(keep_vars=False).items()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("model", [
    vit(), encoder(), ConvMixer(24, 2, kernel_size=5, patch_size=2, num_classes=3),
    SequenceModel(vocab_size=5, pattern="mamba2 attention mamba1", dim=DIM),
])  # fmt: skip
def test_looking_at_parametrised_weights_in_training_moves_nothing(model: nn.Module) -> None:
    for part in [part for part in model.modules() if isinstance(part, nn.Linear | nn.Conv1d | nn.Conv2d)]:
        parametrizations.spectral_norm(part)  # moves its vectors whenever the weight is read in training
    before = copies(model.train())
    assert {row.status for row in espalier.audit(model).layers} == {"skipped"}
    with pytest.raises(EspalierError, match="parametrised"):
        espalier.structure_(model)
    assert not changed(model, before)
    assert all(part.training for part in model.modules())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_part_takes_no_layer_away() -> None:
    model = nn.TransformerDecoderLayer(DIM, 2, batch_first=True)
    model.register_module("linear1", torch.jit.script(model.linear1))
    assert [row.status for row in espalier.structure_(model, generator=seeded()).layers] == ["written", "skipped"]
    assert [row.status for row in espalier.audit(model).layers] == ["present", "skipped"]


def test_a_layer_inside_a_decoder_layer_is_judged_by_itself() -> None:
    model = nn.ModuleList(nn.TransformerDecoderLayer(DIM, 2, batch_first=True) for _ in range(2))
    model[0].linear1.register_forward_pre_hook(lambda *_: None)  # no business of attention's
    model[1].self_attn.requires_grad_(False)
    before = copies(model)
    rows = {row.layer: row for row in espalier.structure_(model, generator=seeded()).layers}
    assert rows["0.self_attn"].status == "written"
    assert not rows["0.self_attn"].note  # its norms come after it
    assert "frozen" in rows["1.self_attn"].note
    assert {name.rpartition(".self_attn.")[0] for name in changed(model, before)} == {"0"}


class Adapter(nn.Module):
    """An adapter of low rank that does something, as peft names its parts."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base_layer, self.update = base, nn.Parameter(torch.randn(base.weight.shape))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.base_layer.weight + self.update
        return nn.functional.conv2d(x, weight, self.base_layer.bias, padding="same", groups=self.base_layer.groups)


@pytest.mark.parametrize("learns", [True, False])
def test_a_convolution_below_an_adapter_is_left_alone(learns: bool) -> None:
    model = nn.Sequential(*(nn.Conv2d(24, 24, 5, padding=2, groups=24) for _ in range(2)))
    model[0] = Adapter(model[0])
    before = copies(model.requires_grad_(learns))
    rows = espalier.structure_(model, generator=seeded()).layers
    assert [row.status for row in rows] == ["skipped", "written"]
    assert "adapter" in rows[0].note
    assert changed(model, before) == {"1.weight"}
    assert "below its adapter" in espalier.audit(model).layers[0].note


def tied_to_cross(model: nn.TransformerDecoder) -> None:
    layer = model.layers[0]
    layer.multihead_attn.in_proj_weight = layer.self_attn.in_proj_weight


def tied_to_hooked(model: nn.TransformerDecoder) -> None:
    model.layers[0].self_attn = model.layers[1].self_attn
    model.layers[2].self_attn.out_proj.weight = model.layers[0].self_attn.out_proj.weight
    model.layers[2].self_attn.register_forward_pre_hook(lambda *_: None)


def tied_by_bias(model: nn.TransformerDecoder) -> None:
    layer = model.layers[0]
    layer.multihead_attn.out_proj.bias = layer.self_attn.out_proj.bias
    nn.init.ones_(layer.multihead_attn.out_proj.bias)


@pytest.mark.parametrize("tie", [tied_to_cross, tied_to_hooked, tied_by_bias])
def test_what_is_left_alone_keeps_its_bits_where_others_are_tied_to_it(tie: object) -> None:
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(DIM, 2, batch_first=True), 4)
    tie(model)  # type: ignore[operator]
    before = copies(model)
    report = espalier.structure_(model, generator=seeded())
    alone = [row for row in report.layers if row.status == "skipped"]
    assert any("which is left alone" in row.note for row in alone)
    moved = changed(model, before)
    assert moved
    assert not [name for name in moved if name.startswith(tuple(f"{row.layer}." for row in alone))]


def test_a_weight_that_another_part_has_is_named() -> None:
    model = encoder()
    layer = model.layers[0]
    layer.self_attn.out_proj.bias = layer.norm1.bias
    notes = [row.note for row in espalier.structure_(model, generator=seeded()).layers]
    assert notes == ["has numbers in common with layers.0.norm1.bias", ""]


def test_a_layer_that_is_partly_on_the_meta_device_waits() -> None:
    model = vit()
    model.blocks[0].attn.qkv.to("meta")
    before = model.blocks[0].attn.proj.weight.clone()
    rows = espalier.structure_(model, generator=seeded()).layers
    assert [row.status for row in rows] == ["skipped", "written"]
    assert "meta device" in rows[0].note
    assert torch.equal(model.blocks[0].attn.proj.weight, before)
    with pytest.raises(EspalierError, match="meta device"):
        espalier.init.fit(model)


def test_weights_of_inference_mode_are_written_inside_of_it_alone() -> None:
    with torch.inference_mode():
        model = vit()
    before = copies(model)
    with pytest.raises(EspalierError, match="inference_mode"):
        espalier.structure_(model, generator=seeded())
    assert not changed(model, before)
    assert {row.status for row in espalier.audit(model).layers} == {"absent"}
    with torch.inference_mode():
        espalier.structure_(model, generator=seeded())
    assert {row.status for row in espalier.audit(model).layers} == {"present"}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(DIM, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("where", ["0.attn", "0"])
def test_a_compiled_part_is_written_as_it_was(where: str) -> None:
    plain, model = nn.Sequential(Block(), Block()), nn.Sequential(Block(), Block())
    model.load_state_dict(plain.state_dict())
    model.set_submodule(where, torch.compile(model.get_submodule(where), backend="eager"))
    for each in (plain, model):
        rows = espalier.structure_(each, generator=seeded()).layers
        assert [row.status for row in rows] == ["written", "written"]
    x = torch.randn(2, 5, DIM)
    torch.testing.assert_close(model(x), plain(x))
