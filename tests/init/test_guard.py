"""What later touches the weights: audit against a guarded report tells kept, changed and lost apart."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import espalier
from espalier.init import StructureReport
from espalier.models import VisionTransformer
from espalier.train.ema import AveragedWeights

transformers = pytest.importorskip("transformers")


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def small() -> VisionTransformer:
    return VisionTransformer(img_size=8, patch_size=2, in_chans=1, embed_dim=48, depth=2, num_heads=3)


def hub_vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=48, num_attention_heads=3, num_hidden_layers=2, intermediate_size=64, image_size=16, patch_size=4
    )
    return transformers.ViTModel(config, add_pooling_layer=False)


def statuses(model: nn.Module, report: StructureReport) -> set[str]:
    return {row.status for row in espalier.audit(model, against=report).layers}


def guarded(model: nn.Module) -> StructureReport:
    keys = list(model.state_dict())
    report = espalier.structure_(model, generator=seeded(), guard=True)
    # The fingerprint is in the report alone: no buffer, no hook.
    assert list(model.state_dict()) == keys
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(row.mark for row in report.layers)
    return StructureReport.from_dict(json.loads(json.dumps(report.to_dict())))


def test_a_guard_sees_the_smallest_change_and_an_audit_without_one_does_not() -> None:
    model = small()
    report = guarded(model)
    assert statuses(model, report) == {"present"}
    weight = model.blocks[1].attn.qkv.weight.data
    kept = weight[5, 7].clone()
    weight[5, 7] = torch.nextafter(kept, torch.tensor(9.0))
    after = espalier.audit(model, against=report)
    assert [row.status for row in after.layers] == ["present", "changed"]
    assert after.ok
    assert {row.status for row in espalier.audit(model).layers} == {"present"}
    weight[5, 7] = kept
    assert statuses(model, after) == {"present"}  # marks are handed on from audit to audit
    model.blocks[0].attn.proj.bias.data[0] = 1e-6
    assert [row.status for row in espalier.audit(model, against=report).layers] == ["changed", "present"]


def test_a_training_step_changes_bits_and_keeps_structure() -> None:
    model = small()
    report = guarded(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.randn(4, 1, 8, 8, generator=seeded())).square().mean().backward()
    optimizer.step()
    assert statuses(model, report) == {"changed"}
    assert statuses(model.bfloat16(), report) == {"changed"}


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compile": torch.compile,
    "data parallel": lambda model: nn.DataParallel(model),
    "deepcopy": copy.deepcopy,
    "averaged": lambda model: torch.optim.swa_utils.AveragedModel(model),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_keep_every_bit(wrapper: str) -> None:
    model = small()
    report = guarded(model)
    assert statuses(WRAPPERS[wrapper](model), report) == {"present"}


def test_fabric_keeps_every_bit() -> None:
    fabric_class = pytest.importorskip("lightning_fabric").Fabric
    # Said outright, so that Fabric does not look for a cluster on this machine.
    alone = pytest.importorskip("lightning_fabric.plugins.environments").LightningEnvironment()
    fabric = fabric_class(accelerator="cpu", devices=1, plugins=[alone])
    model = small()
    report = guarded(model)
    wrapped, _ = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert statuses(wrapped, report) == {"present"}


def test_our_averaged_weights_keep_every_bit_before_the_first_step() -> None:
    model = small()
    report = guarded(model)
    averaged = AveragedWeights(model, 0.9)
    averaged.update()
    with averaged.applied():
        assert {row.status for row in espalier.audit(model, against=report).layers} == {"present"}


def test_save_and_load_keep_every_bit(tmp_path: Path) -> None:
    model = hub_vit()
    report = guarded(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.ViTModel.from_pretrained(tmp_path, add_pooling_layer=False)
    assert statuses(loaded, report) == {"present"}
    classifier = transformers.ViTForImageClassification.from_pretrained(tmp_path)
    assert [row.status for row in espalier.audit(classifier).layers] == ["present", "present"]


def _post_init(model: nn.Module) -> None:
    for module in model.modules():  # as a fresh model is: transformers skips what it has initialised already
        module._is_hf_initialized = False
    for parameter in model.parameters():
        parameter._is_hf_initialized = False
    model.init_weights()


def _reset_parameters(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()


def test_initialisers_that_run_afterwards_are_caught() -> None:
    model = hub_vit()
    for undo in (_post_init, _reset_parameters):
        report = guarded(model)
        undo(model)
        after = espalier.audit(model, against=report)
        assert {row.status for row in after.layers} == {"lost"}
        assert not after.ok
    own = small()
    report = guarded(own)
    own.init_weights(seeded())
    assert statuses(own, report) == {"lost"}


def test_transformers_on_meta_can_be_written_after_to_empty() -> None:
    with torch.device("meta"):
        lazy = hub_vit()
    assert {row.status for row in espalier.structure_(lazy).layers} == {"skipped"}
    lazy.to_empty(device="cpu")
    eager = hub_vit()
    for model in (lazy, eager):
        espalier.structure_(model, generator=seeded())
    theirs, ours = dict(eager.named_parameters()), dict(lazy.named_parameters())
    names = [name for name in ours if "_proj.weight" in name]
    assert len(names) == 8
    assert all(torch.equal(ours[name], theirs[name]) for name in names)
