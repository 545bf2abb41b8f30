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
