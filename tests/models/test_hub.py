"""Models go to the hub and come back: the same function, a card with what is known of them, no network when cached."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

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


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.reset_classifier(4, ""),
        lambda net: net.prune_intermediate_layers([0]),
        lambda net: setattr(net, "blocks", net.blocks[:1]),
    ],
)
def test_changed_pooling_and_depth_are_saved_as_they_are(change: Callable[[ConvMixer], Any], tmp_path: Path) -> None:
    model, example = ConvMixer(8, 3, 3, 2, num_classes=4).eval(), IMAGES
    change(model)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(ConvMixer.from_pretrained(tmp_path), example), logits(model, example))


def test_a_changed_average_over_mirror_images_is_saved_as_it_is(tmp_path: Path) -> None:
    model = KWLarge(2, img_size=8).eval()
    model.flip_average = True
    model.save_pretrained(tmp_path)
    example = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits(KWLarge.from_pretrained(tmp_path), example), logits(model, example))


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
def test_models_over_transformers_can_be_shared(
    cls: type[HubModel], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Backbone(nn.Conv2d):  # in place of the library's: what is shared is the arguments and the weights
        def __init__(self, *_: Any, **__: Any) -> None:
            super().__init__(3, 12, 4)
            self.embeddings = SimpleNamespace(position_embeddings=torch.zeros(1, 65, 12))

    config = lambda **_: SimpleNamespace(initializer_range=0.02)  # noqa: E731
    names = {"ViTConfig": config, "ViTModel": Backbone, "ConvNextConfig": config, "ConvNextModel": Backbone}
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(**names))
    model = cls(num_classes=4, **({"embed_dim": 12} if cls is TransformersViT else {"depths": (1,), "dims": (12,)}))
    model.save_pretrained(tmp_path)
    again = cls.from_pretrained(tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
