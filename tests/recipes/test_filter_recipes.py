"""Recipes, arms and plans of ConvMixer and its filters: what they say is what a run gets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
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
from espalier.train.schedule import learning_rate
from reference.convmixer_original import original_convmixer


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def net(width: int = 24, depth: int = 3, kernel: int = 5, patch: int = 2) -> ConvMixer:
    model = ConvMixer(width, depth, kernel_size=kernel, patch_size=patch, num_classes=10)
    model.init_weights(seeded())
    return model


@pytest.mark.parametrize(
    ("name", "definition"),
    [
        ("convmixer_cifar10", (256, 8, 5, 2, 10)),
        ("convmixer_cifar10_100", (256, 8, 5, 2, 10)),
        ("convmixer_cifar10_96", (256, 8, 9, 1, 10)),
        ("convmixer_imagenet", (1536, 20, 9, 7, 1000)),
    ],
)
def test_published_recipes_train_the_papers_network_on_the_scripts_schedule(
    name: str, definition: tuple[int, ...]
) -> None:
    recipe = resolve_recipe(get_recipe(name))
    with torch.device("meta"):
        original = original_convmixer(*definition)
        arguments = {"num_classes": definition[-1], "in_chans": 3, "img_size": 32, **recipe.model_args}
        model = models.build_model(recipe.model, **arguments)
    assert [p.shape for p in model.parameters()] == [p.shape for p in original.parameters()]
    # The published script: np.interp(t, [0, E·2//5, E·4//5, E], [0, lr, lr/20, 0]) at t = epoch + (step + 1)/steps.
    epochs, ends = recipe.epochs, np.arange(1, 10 * recipe.epochs + 1) / 10
    script = np.interp(ends, [0, epochs * 2 // 5, epochs * 4 // 5, epochs], [0, recipe.lr, recipe.lr / 20, 0])
    assert [learning_rate(recipe, step, 10) for step in range(len(ends))] == pytest.approx(script.tolist())


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


def test_shrinkage_mixes_the_statistics_with_their_closest_closed_form(tmp_path: Path) -> None:
    small = net(width=100, depth=1, kernel=5)
    INITS["covariance"](small, generator=seeded(2))
    filters = depthwise_layers(small)[0][1].weight.detach().flatten(1).double()
    own = filters.mT @ filters / len(filters)

    def closest(sigma: float) -> torch.Tensor:
        form = filter_covariance(5, sigma)
        return form * (form * own).sum() / form.square().sum()

    target = min(map(closest, torch.linspace(0.3, 4, 400).tolist()), key=lambda form: float((own - form).norm()))
    path = str(FilterStatistics.from_model(small).save(tmp_path / "stats.safetensors"))
    shares = []
    for argument in (0, 1.0, 0.25, "auto", None):
        model = nn.Sequential(nn.Conv2d(50_000, 50_000, 5, padding=2, groups=50_000))
        chosen = {} if argument is None else {"shrink": argument}
        INITS["transferred"](model, generator=seeded(1), statistics=path, **chosen)
        drawn = depthwise_layers(model)[0][1].weight.detach().flatten(1).double()
        found = drawn.mT @ drawn / len(drawn)
        share = float(((found - own) * (target - own)).sum() / (target - own).square().sum())
        rest = found - (1 - share) * own - share * target
        assert rest.norm() < 0.1 * (target - own).norm()
        shares.append(share)
    assert shares[:3] == pytest.approx([0, 1, 0.25], abs=0.05)
    assert shares[3] == shares[4]
    assert (
        0.3 < shares[3] <= 1.05
    )  # 100 filters in 25 dimensions that follow the target: most of what is apart is noise
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
    recipe = merge_keyword_fields(get_recipe("convmixer_filters"), rest, found)
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
