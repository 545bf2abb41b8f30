"""Recipes, arms and plans of ConvMixer and its filters: what they say is what a run gets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from espalier import models
from espalier.cli.main import main
from espalier.cli.recipe_flags import merge_keyword_fields, split_keyword_fields
from espalier.errors import EspalierError
from espalier.init import FilterCovariance, FilterStatistics, depthwise_layers, filter_covariance
from espalier.models import ConvMixer
from espalier.recipes import INITS, Recipe, apply_arm, get_recipe
from espalier.recipes.validation import resolve_recipe
from espalier.train import load_run, train


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def net(width: int = 24, depth: int = 3, kernel: int = 5, patch: int = 2) -> ConvMixer:
    model = ConvMixer(width, depth, kernel_size=kernel, patch_size=patch, num_classes=10)
    model.init_weights(seeded())
    return model


@pytest.mark.parametrize(
    ("name", "parameters", "fields"),
    [
        ("convmixer_cifar10", 594_186, {"epochs": 25, "lr": 0.05, "weight_decay": 0.005, "batch_size": 512}),
        ("convmixer_cifar10_100", 594_186, {"epochs": 100, "lr": 0.05, "weight_decay": 0.005, "batch_size": 512}),
        (
            "convmixer_cifar10_96",
            706_570,
            {
                "epochs": 200, "lr": 0.01, "eps": 1e-3, "clip_norm": 1.0, "mixup": 0.5, "cutmix": 0.5,
                "erasing": 0.25, "crop_scale": (0.75, 1.0),
            },
        ),
        (
            "convmixer_imagenet",
            51_625_960,
            {
                "batch_size": 640, "lr": 0.01, "eps": 1e-3, "clip_norm": 1.0, "weight_decay": 2e-5,
                "label_smoothing": 0.1, "mixup": 0.5, "cutmix": 0.5, "erasing": 0.25, "randaugment": (2, 9),
            },
        ),
    ],
)  # fmt: skip
def test_published_settings(name: str, parameters: int, fields: dict) -> None:
    recipe = resolve_recipe(get_recipe(name))
    assert (recipe.optimizer, recipe.schedule, recipe.flip) == ("adamw", "piecewise", True)
    assert {field: getattr(recipe, field) for field in fields} == fields
    classes = 1000 if name == "convmixer_imagenet" else 10
    with torch.device("meta"):
        model = models.build_model(recipe.model, num_classes=classes, in_chans=3, img_size=32, **recipe.model_args)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_transferred_filters_follow_another_network_s_statistics(tmp_path: Path) -> None:
    small = net(width=400, depth=3, kernel=5)
    INITS["covariance"](small, generator=seeded(2))
    path = str(FilterStatistics.from_model(small).save(tmp_path / "stats.safetensors"))
    # Deeper, wider, of another patch and kernel.
    big = net(width=5000, depth=5, kernel=7, patch=4)
    untouched = big.blocks[1][1].weight.clone()
    report = INITS["transferred"](big, generator=seeded(3), statistics=path, shrink=0.0)
    assert [row.status for row in report.layers] == ["written"] * 5
    assert torch.equal(big.blocks[1][1].weight, untouched)
    expected = FilterStatistics.load(path).resample(7, depth=5)
    for (_, module), layer in zip(depthwise_layers(big), expected.layers, strict=True):
        filters = module.weight.detach().flatten(1).double()
        found, target = filters.mT @ filters / len(filters), layer.covariance
        bound = ((target.trace() ** 2 + target.square().sum()) / len(filters)).sqrt()
        assert (found - target).norm() < 4.5 * bound


def test_shrinkage_is_the_statistics_own(tmp_path: Path) -> None:
    small = net(width=16, depth=2, kernel=5)
    statistics = FilterStatistics.from_model(small)
    path = str(statistics.save(tmp_path / "stats.safetensors"))
    for argument, strength in ((None, "auto"), ("auto", "auto"), (1.0, 1.0), (0, 0.0)):
        model, twin = net(), net()
        chosen = {} if argument is None else {"shrink": argument}
        INITS["transferred"](model, generator=seeded(1), statistics=path, **chosen)
        layers = depthwise_layers(twin)
        seeds = [int(torch.randint(2**62, (), generator=g)) for g in [seeded(1)] for _ in layers]
        for index, ((_, module), seed) in enumerate(zip(layers, seeds, strict=True)):
            statistics.shrink(strength=strength).sample_(module.weight, index / 2, generator=seeded(seed))
        for (_, a), (_, b) in zip(depthwise_layers(model), layers, strict=True):
            assert torch.equal(a.weight, b.weight)
    with pytest.raises(EspalierError, match="strength 2"):
        INITS["transferred"](net(), generator=seeded(), statistics=path, shrink=2)
    with pytest.raises(EspalierError, match="nowhere"):
        INITS["transferred"](net(), generator=seeded(), statistics="nowhere")


@pytest.mark.parametrize("tokens", [["--init", "s.safetensors"], ["--init=s.safetensors"]])
def test_a_file_as_init_means_transferred(tokens: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rest, found = split_keyword_fields(["--lr", "1e-3", *tokens, "--epochs", "3"])
    assert rest == ["--lr", "1e-3", "--init", "transferred", "--epochs", "3"]
    assert found == {"init_args": {"statistics": str(tmp_path / "s.safetensors")}}
    # Nothing else is touched, and neither is a file that is no value of --init.
    others = ["--init", "covariance", "--out", "x.safetensors", "y.safetensors"]
    assert split_keyword_fields(others) == (others, {})
    # The arms that transfer keep the recipe's statistics, the others drop them.
    recipe = merge_keyword_fields(get_recipe("convmixer_filters"), found)
    assert apply_arm(recipe, "transferred-frozen").init_args == found["init_args"]
    assert apply_arm(recipe, "covariance").init_args == {}


def test_the_command_measures_runs_pooled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = replace(get_recipe("digits_convmixer"), epochs=1, data_args={"train_limit": 128, "test_limit": 50})
    runs = [train(replace(base, seed=seed), tmp_path / str(seed), progress=False) for seed in (0, 1)]
    out = tmp_path / "stats.safetensors"
    assert main(["statistics", *(str(run.path) for run in runs), "--out", str(out)]) == 0
    assert "blocks.0.0.fn.0: kernel 7×7, 96 filters" in capsys.readouterr().out
    expected = FilterStatistics.from_model([run.model() for run in runs])
    for ours, theirs in zip(FilterStatistics.load(out).layers, expected.layers, strict=True):
        assert torch.equal(ours.covariance, theirs.covariance)
    # What it wrote starts another network through the same command line that trains it.
    assert main(["train", "digits_convmixer", "--init", str(out), "--freeze", "depthwise", "--epochs", "1",
                 "--data-args.train-limit", "128", "--model-args.dim", "32", "--model-args.depth", "3",
                 "--model-args.kernel-size", "5", "--out", str(tmp_path / "moved"), "--quiet"]) == 0  # fmt: skip
    assert load_run(tmp_path / "moved").recipe.init == "transferred"
    assert main(["statistics", str(tmp_path / "0"), "--out", str(tmp_path / "no" / "s.safetensors")]) == 2


@pytest.mark.parametrize("arm", ["covariance-frozen", "transferred-frozen"])
def test_frozen_filters_stay_what_they_were_drawn_as(arm: str, tmp_path: Path) -> None:
    path = FilterStatistics.from_model(net()).save(tmp_path / "s.safetensors")
    base: Recipe = replace(
        get_recipe("digits_convmixer"),
        epochs=1,
        init_args={"statistics": str(path)},
        data_args={"train_limit": 128, "test_limit": 50},
    )
    run = train(apply_arm(base, arm), tmp_path / "run", progress=False)
    start, final = run.model("start"), run.model("final")
    for (_, a), (_, b) in zip(depthwise_layers(start), depthwise_layers(final), strict=True):
        assert torch.equal(a.weight, b.weight)
        assert a.bias is not None
        assert not torch.equal(a.bias, b.bias)
    assert isinstance(final.head, nn.Linear)
    assert not torch.equal(start.head.weight, final.head.weight)


def test_filters_of_the_psd_form_have_its_covariance() -> None:
    model = net(width=20_000, depth=1)
    INITS["covariance"](model, generator=seeded(5), variant="psd")
    filters = model.blocks[0][0].fn[0].weight.detach().flatten(1).double()
    target = filter_covariance(5, FilterCovariance().sigma_at(0.5), variant="psd")
    bound = ((target.trace() ** 2 + target.square().sum()) / len(filters)).sqrt()
    assert (filters.mT @ filters / len(filters) - target).norm() < 4.5 * bound
