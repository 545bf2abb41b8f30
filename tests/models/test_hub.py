"""Models go to the hub and come back: the same function, a card with what is known of them, no network when cached."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import espalier
from espalier.checkpoints import open_host_model
from espalier.errors import EspalierError
from espalier.models import ConvMixer, KWLarge, SequenceModel, TransformersConvNext, TransformersViT, VisionTransformer
from espalier.models.hub import HubModel
from hub_standin import Hub

pytest.importorskip("huggingface_hub")

IMAGES = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
TOKENS = torch.arange(12).reshape(2, 6) % 7
SMALL: dict[str, tuple[type[HubModel], dict[str, Any], Tensor]] = {
    "vit": (VisionTransformer, {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}, IMAGES),
    "convmixer": (ConvMixer, {"dim": 8, "depth": 1, "kernel_size": 3, "patch_size": 2, "num_classes": 4}, IMAGES),
    "kwlarge": (KWLarge, {"width": 2, "hidden": 12, "img_size": (8, 8)}, IMAGES),
    "sequence": (SequenceModel, {"vocab_size": 7, "dim": 16, "pattern": "mamba2*1", "head_dim": 8}, TOKENS),
}


def make(name: str) -> tuple[HubModel, Tensor]:
    cls, arguments, example = SMALL[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = cls(**arguments)
        for parameter in model.parameters():  # nothing is what a fresh model of the same seed would have
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval(), example


def logits(model: Any, example: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(example)
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("name", SMALL)
def test_folder_gives_the_same_function(name: str, tmp_path: Path) -> None:
    model, example = make(name)
    model.save_pretrained(tmp_path / "model")
    back = type(model).from_pretrained(tmp_path / "model")
    assert type(back) is type(model)
    torch.testing.assert_close(logits(back, example), logits(model, example))
    back.save_pretrained(tmp_path / "again")  # what came back can be shared in its turn
    assert (tmp_path / "again/config.json").read_text() == (tmp_path / "model/config.json").read_text()


@pytest.mark.parametrize("name", SMALL)
def test_hub_gives_the_same_function_and_needs_no_network_twice(
    name: str, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, example = make(name)
    model.push_to_hub("trees/pear")
    assert {"config.json", "model.safetensors", "README.md"} <= hub.repositories["trees/pear"].keys()
    for back in (type(model).from_pretrained("trees/pear"), open_host_model("espalier:trees/pear")):
        torch.testing.assert_close(logits(back, example), logits(model, example))
    hub.asked.clear()
    back = type(model).from_pretrained("trees/pear", local_files_only=True)
    torch.testing.assert_close(logits(back, example), logits(model, example))
    assert hub.asked == []


def test_changed_head_is_saved_as_it_is(tmp_path: Path) -> None:
    model, example = make("vit")
    model.reset_classifier(3)
    model.save_pretrained(tmp_path)
    assert logits(VisionTransformer.from_pretrained(tmp_path), example).shape == (2, 3)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_remember_their_arguments(copied: Any, tmp_path: Path) -> None:
    model, example = make("convmixer")
    copied(model).save_pretrained(tmp_path)
    torch.testing.assert_close(logits(ConvMixer.from_pretrained(tmp_path), example), logits(model, example))


@pytest.mark.parametrize("name", ["trees/none", "no such thing", "../up"])
def test_what_is_not_there_is_one_line(name: str, hub: Hub) -> None:
    with pytest.raises(EspalierError, match=r"VisionTransformer from .*") as caught:
        VisionTransformer.from_pretrained(name)
    assert "\n" not in str(caught.value)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    make("vit")[0].save_pretrained(tmp_path)
    with pytest.raises(EspalierError, match="ConvMixer from"):
        ConvMixer.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"espalier_model": "os.system"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(EspalierError, match=r"os\.system"):
        espalier.models.hub.open_hub_model(str(tmp_path))


def test_import_leaves_the_hub_alone() -> None:
    probe = "import sys, espalier; raise SystemExit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], check=False).returncode == 0


@pytest.mark.parametrize("cls", [TransformersViT, TransformersConvNext])
def test_models_over_transformers_can_be_shared(cls: type[HubModel]) -> None:
    assert issubclass(cls, HubModel)
