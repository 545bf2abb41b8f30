"""``structure_`` says before it writes that it is about to overwrite weights that look trained."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

import espalier
from espalier.init import TrainedWeightsWarning
from espalier.models import ConvMixer, SequenceModel, VisionTransformer

SMALL: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: VisionTransformer(img_size=8, patch_size=4, embed_dim=32, depth=2, num_heads=2),
    "convmixer": lambda: ConvMixer(16, 2, kernel_size=5, patch_size=2),
    "mamba": lambda: SequenceModel(8, 32, "mamba2*2", head_dim=16),
    "torch": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), 2),
}


def trained(model: nn.Module, steps: int = 3) -> nn.Module:
    """Take a few real optimiser steps on noise."""
    tokens = isinstance(model, SequenceModel)
    shape = (4, 6, 32) if isinstance(model, nn.TransformerEncoder) else (4, 3, 8, 8)
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(8, (4, 6), generator=generator) if tokens else torch.randn(shape, generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(steps):
        out = model(x)
        (out[0] if isinstance(out, tuple) else out).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def warned(model: nn.Module) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        espalier.structure_(model, generator=torch.Generator().manual_seed(0))
    return [str(w.message) for w in caught if issubclass(w.category, TrainedWeightsWarning)]


@pytest.mark.parametrize("name", SMALL)
def test_fresh_models_are_written_without_a_word(name: str) -> None:
    model = SMALL[name]()
    assert warned(model) == []
    assert warned(model) == []  # nor is structure itself taken for training
    assert warned(model.to(torch.bfloat16)) == []


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(
    "brought", [lambda m: m, copy.deepcopy, lambda m: m.to(torch.bfloat16)], ids=["same", "copied", "cast"]
)
def test_trained_weights_are_told_however_they_came(name: str, brought: Callable[[nn.Module], nn.Module]) -> None:
    model = brought(trained(SMALL[name](), steps=20))
    fresh = SMALL[name]().to(next(model.parameters()).dtype)
    fresh.load_state_dict(model.state_dict())
    (message,) = warned(fresh)
    assert "look trained" in message
    assert "\n" not in message


def test_as_an_error_it_stops_before_anything_is_written() -> None:
    model = trained(SMALL["vit"]())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", TrainedWeightsWarning)
        with pytest.raises(TrainedWeightsWarning):
            espalier.structure_(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_audit_and_the_meta_device_say_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        espalier.audit(trained(SMALL["vit"]()))
        with torch.device("meta"):
            model = SMALL["vit"]()
        espalier.structure_(model)


def test_transformers_models_from_a_folder(tmp_path: object) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4
    )
    model = transformers.ViTModel(config)
    assert warned(model) == []
    model.save_pretrained(tmp_path)
    # Saved before its first step, its weights are as fresh as they were.
    assert warned(transformers.ViTModel.from_pretrained(tmp_path)) == []
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            with torch.no_grad():
                module.weight += 0.01 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path)
    assert len(warned(transformers.ViTModel.from_pretrained(tmp_path))) == 1
