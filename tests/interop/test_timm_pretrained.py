"""timm's pre-trained weights by name: from a hub, from its cache without it, and one line when there are none."""

from __future__ import annotations

import io
import json

import pytest
import torch
from safetensors.torch import save

import espalier
from espalier.checkpoints import open_host_model
from espalier.errors import EspalierError
from hub_standin import Hub

timm = pytest.importorskip("timm")
NAME = "test_vit"
TAGGED = f"{NAME}.r160_in1k"


@pytest.fixture
def uploaded(hub: Hub) -> torch.nn.Module:
    """Put a small model of timm's on the hub, under an author's name and under timm's own, and return it."""
    model = timm.create_model(NAME)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(parameter.numel()))
    config = {"architecture": NAME, "num_classes": 1000, "num_features": model.num_features,
              "pretrained_cfg": {**timm.get_pretrained_cfg(TAGGED).to_dict(), "tag": "r160_in1k"}}  # fmt: skip
    binary = io.BytesIO()
    torch.save(model.state_dict(), binary)
    files = {
        "config.json": json.dumps(config, default=str).encode(),
        "model.safetensors": save(model.state_dict()),
        "pytorch_model.bin": binary.getvalue(),
    }
    hub.repositories |= {"trees/vit": files, f"timm/{TAGGED}": files}
    return model


def same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    torch.testing.assert_close(one.state_dict(), other.state_dict())


@pytest.mark.parametrize("name", ["hf-hub:trees/vit", TAGGED])
def test_pretrained_weights_come_from_the_hub_then_from_its_cache(
    uploaded: torch.nn.Module, hub: Hub, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    same(open_host_model(f"timm:{name}"), uploaded)
    hub.repositories.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.asked.clear()
    same(open_host_model(f"timm:{name}"), uploaded)
    assert hub.asked == []


def test_weights_that_are_nowhere_are_one_line(hub: Hub) -> None:
    with pytest.raises(EspalierError, match="trees/none") as caught:
        open_host_model("timm:hf-hub:trees/none")
    assert "\n" not in str(caught.value)


def test_structure_warns_before_it_overwrites_what_was_trained(uploaded: torch.nn.Module) -> None:
    model = open_host_model("timm:hf-hub:trees/vit")
    with pytest.warns(UserWarning, match="trained"):
        espalier.structure_(model)
