"""The watch beside accelerate: registered for checkpointing, it is saved and checked with the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_runs import images, lose_structure, vit
from torch import nn

from espalier.integrations import StructureWatch, UnhealthyModelError
from needs import needs_library

pytestmark = needs_library("accelerate", "accelerate")


def prepared(seed: int = 0) -> tuple[object, nn.Module, StructureWatch]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = vit(seed)
    model, optimizer, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), images())
    watch = StructureWatch(model, optimizer, structure=True)
    accelerator.register_for_checkpointing(watch)
    return accelerator, model, watch


def test_saved_state_is_checked_when_it_is_loaded(tmp_path: Path) -> None:
    accelerator, model, watch = prepared()
    with watch:
        accelerator.save_state(tmp_path / "good")
    lose_structure(model.blocks[1].attn)
    watch.state_dict = lambda: {"structure": watch.report.to_dict()}  # the state of before the loss
    accelerator.save_state(tmp_path / "bad")

    accelerator, resumed, watch = prepared(seed=5)
    accelerator.load_state(tmp_path / "good")
    loaded = {name: value.clone() for name, value in resumed.state_dict().items()}
    with watch:
        assert all(torch.equal(value, loaded[name]) for name, value in resumed.state_dict().items())
    assert [check.stage for check in watch.checks] == ["checkpoint loaded", "end"]

    accelerator, _, _ = prepared(seed=5)
    with pytest.raises(UnhealthyModelError, match=r"checkpoint loaded: blocks\.1\.attn: structure lost"):
        accelerator.load_state(tmp_path / "bad")
