"""Pre-trained models by name from a hub: the same weights, the cache, one line for what is not there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from espalier.checkpoints import open_host_model
from espalier.errors import EspalierError
from hub_standin import Hub

pytest.importorskip("huggingface_hub")


@pytest.fixture
def uploaded(hub: Hub, tmp_path: Path) -> torch.nn.Module:
    """Put a small ViT of transformers' on the hub, as its authors would, and return it."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.ViTForImageClassification(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(tmp_path / "vit")
    hub.repositories["trees/vit"] = {path.name: path.read_bytes() for path in (tmp_path / "vit").iterdir()}
    return model


def test_transformers_by_name_has_the_uploaded_weights(uploaded: torch.nn.Module, hub: Hub) -> None:
    model = open_host_model("transformers:trees/vit")
    assert type(model) is type(uploaded)
    for (name, ours), (_, theirs) in zip(model.named_parameters(), uploaded.named_parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


def test_cache_is_enough_when_the_hub_is_gone(
    uploaded: torch.nn.Module, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_host_model("transformers:trees/vit")
    hub.repositories.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.asked.clear()
    model = open_host_model("transformers:trees/vit")
    torch.testing.assert_close(next(model.parameters()), next(uploaded.parameters()))
    assert hub.asked == []


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize("name", ["transformers:trees/none", "espalier:trees/none", "transformers:none"])
def test_what_is_neither_on_the_hub_nor_cached_is_one_line(
    name: str, offline: bool, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    with pytest.raises(EspalierError, match="none") as caught:
        open_host_model(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["transformers:a/b/c", "transformers:/nowhere/at all", "transformers:../x"])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(path: str, hub: Hub) -> None:
    with pytest.raises(EspalierError, match="name a folder"):
        open_host_model(path)
    assert hub.asked == []


@pytest.mark.parametrize("text", ["{}", '{"model_type": "no-such"}', '{"model_type": "vit", "hidden_size": -24}',
                                  '{"model_type": "vit", "hidden_size": "wide"}', '{"model_type": 3}'])  # fmt: skip
def test_a_configuration_that_builds_no_model_is_one_line(text: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(EspalierError, match="cannot be had from its folder") as caught:
        open_host_model(f"transformers:{tmp_path}")
    assert "\n" not in str(caught.value)
