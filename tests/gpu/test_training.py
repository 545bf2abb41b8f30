"""Initialisers, optimisers, the compiler, the loop, augmentation and certificates on the device."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import espalier
from cases_gpu import CASES, NETWORKS, run, worst_error
from espalier.certify import certify, challenge
from espalier.data.augmentation import Augmentation
from espalier.errors import require
from espalier.models import OrthogonalConvNet
from espalier.randomness import derive_generator
from espalier.recipes import INITS, Recipe, get_recipe
from espalier.train import loop, train

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:espalier runs Mamba:UserWarning")]


@pytest.fixture
def on_device(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that trains a recipe on the device or on the CPU."""
    fabric_class = require("lightning_fabric", "train").Fabric

    def run_recipe(recipe: Recipe, out: Path, where: torch.device) -> Any:
        def make(chosen: Recipe, strategy: str) -> Any:
            precision = {"32": "32-true", "bf16": "bf16-mixed"}[chosen.precision]
            return fabric_class(accelerator="gpu" if where.type == "cuda" else "cpu", devices=1, precision=precision)

        monkeypatch.setattr(loop, "make_fabric", make)
        return train(recipe, out, progress=False)

    return run_recipe


@pytest.mark.parametrize("init", ["mimetic", "mimetic_ssm", "covariance", "structured", "impulse", "semi_orthogonal"])
def test_one_seed_writes_the_same_structure_everywhere(init: str, device: torch.device) -> None:
    name = {"mimetic_ssm": "sequence", "covariance": "convmixer"}.get(init, "vit")
    model, _ = NETWORKS[name].seeded()
    twin = copy.deepcopy(model).to(device)
    INITS[init](model, generator=torch.Generator().manual_seed(5))
    report = INITS[init](twin, generator=torch.Generator().manual_seed(5))
    for (where, one), two in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        # Factors of one product may differ by what a basis is free in only where singular values tie: noise has none.
        torch.testing.assert_close(two.cpu(), one, rtol=1e-3, atol=1e-4, msg=lambda text, w=where: f"{w}: {text}")
    assert report is None or report.ok


def test_audit_reads_on_the_device_what_was_written(device: torch.device) -> None:
    model, _ = NETWORKS["sequence"].seeded()
    model = model.to(device)
    report = espalier.structure_(model, generator=torch.Generator().manual_seed(0))
    found = espalier.audit(model, against=report)
    assert found.ok
    assert [row.layer for row in found.layers if row.status == "present"] == [
        row.layer for row in report.layers if row.status == "written"
    ]


@pytest.mark.parametrize("precision", ["32", "bf16"])
@pytest.mark.parametrize("name", ["digits_vit", "digits_convmixer", "digits_robust"])
def test_the_loop_learns_as_on_the_cpu(
    name: str, precision: str, device: torch.device, on_device: Any, tmp_path: Path
) -> None:
    # No augmentation, whose draws differ by device; three epochs, before rounding has grown into another trajectory.
    recipe = replace(get_recipe(name), epochs=3, warmup_epochs=0, precision=precision, crop_padding=0, flip=False)
    here = on_device(recipe, tmp_path / "cpu", torch.device("cpu"))
    there = on_device(recipe, tmp_path / "device", device)
    for one, two in zip(here.rows, there.rows, strict=True):
        if one["train_loss"] is not None:
            assert math.isclose(one["train_loss"], two["train_loss"], rel_tol=0.02 if precision == "32" else 0.1)
    assert abs(here.result["score"] - there.result["score"]) <= 0.06
    assert there.result["score"] > 0.3  # chance is 0.1


@pytest.mark.parametrize("name", ["copy_mamba1", "copy_mamba2"])
def test_the_loop_trains_sequences(name: str, device: torch.device, on_device: Any, tmp_path: Path) -> None:
    recipe = replace(get_recipe(name), epochs=1, batch_size=16)
    recipe = replace(recipe, data_args={**recipe.data_args, "length": 6, "steps_per_epoch": 20})
    run = on_device(recipe, tmp_path / "run", device)
    assert run.rows[-1]["train_loss"] < math.log(16) + 0.1
    assert not run.result["diverged"]


def test_augmentation_stays_on_the_device(device: torch.device) -> None:
    everything = Augmentation(4, (0.6, 1.0), True, (2, 9), 0.25, 0.5, 0.5)
    pixels = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8, device=device)
    labels = torch.arange(8, device=device) % 4
    before = torch.get_rng_state()
    draws = [everything(pixels, labels, 4, generator=derive_generator(0, "a", i, device=device)) for i in (1, 1, 2)]
    for images, targets in draws:
        assert images.device.type == targets.device.type == device.type
        assert images.min() >= 0
        assert images.max() <= 1
        assert targets.shape == (8, 4)
    torch.testing.assert_close(draws[0], draws[1], rtol=0, atol=1e-6)
    assert not torch.equal(draws[0][0], draws[2][0])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD])
def test_fused_optimisers_step_as_the_plain_ones(kind: type[torch.optim.Optimizer], device: torch.device) -> None:
    module, x = NETWORKS["kwlarge"].seeded()
    module, x = module.to(device), x.to(device)
    nets = {fused: copy.deepcopy(module) for fused in (False, True)}
    for fused, net in nets.items():
        optimizer = kind(net.parameters(), lr=1e-2, fused=fused)
        for _ in range(3):
            net(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for one, two in zip(nets[False].parameters(), nets[True].parameters(), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("name", ["convmixer", "vit", "sequence", "orthogonal-convnet", "kwlarge", "mamba1", "mamba2"])
def test_compiled_modules_agree(name: str, device: torch.device) -> None:
    module, x = CASES[name].seeded()
    module, x = module.to(device), x.to(device)
    plain = {key: value.cpu().double() for key, value in run(copy.deepcopy(module), x).items()}
    torch.compiler.reset()
    found = {key.removeprefix("_orig_mod."): value for key, value in run(torch.compile(module), x).items()}
    error, where = worst_error(found, plain)
    assert error <= 2e-4, f"{where} is off by {error:.1e}"


@pytest.mark.parametrize("last", ["orthogonal", "normalized"])
def test_certificates_agree_with_the_cpu_and_hold(last: str, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(3)
    net: nn.Module = OrthogonalConvNet((8,), (1,), hidden=32, img_size=16, head=last)
    images, labels = torch.rand(24, 3, 16, 16, generator=generator), torch.randint(10, (24,), generator=generator)
    with torch.no_grad():
        labels[:16] = net.eval()(images[:16]).argmax(1)
    here = certify(net, images, labels)
    net, images, labels = net.to(device), images.to(device), labels.to(device)
    there = certify(net, images, labels)
    assert here.predictions == there.predictions
    # Radii lose the rounding that was met, which differs by device: nothing else does.
    torch.testing.assert_close(torch.tensor(there.radii), torch.tensor(here.radii), rtol=1e-3, atol=1e-4)
    report = challenge(net, images, labels, there)
    assert report is not None
