"""Arguments of a model, its data and its initialisation, whatever their names are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from espalier.cli.commands import COMMANDS
from espalier.cli.main import main
from espalier.cli.parse import parse
from espalier.recipes import get_recipe

CODE = """
from torch import nn
from torch.utils.data import TensorDataset
import torch


class Net(nn.Sequential):
    def __init__(self, num_classes, lr=1.0, out=1, name="net", help=0, no_flip=0, scale=1.0, opt=None):
        super().__init__(nn.Flatten(), nn.Linear(64, num_classes))


def weak(model, generator, scale=0.1):
    model[1].weight.data.normal_(0.0, scale, generator=generator)


def noise(seed=0, batch_size=3):
    generator = torch.Generator().manual_seed(seed)
    data = TensorDataset(torch.randn(32, 1, 8, 8, generator=generator), torch.arange(32) % 2)
    return data, data
"""
NET = ["train", "digits_vit", "--model", "own.py:Net", "--dataset", "own.py:noise"]
FAST = ["--epochs", "1", "--batch-size", "16", "--threads", "1", "--quiet", "--out", "run"]


@pytest.fixture(autouse=True)
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)


def recipe_of(*words: str) -> dict[str, Any]:
    assert main([*words, *FAST]) == 0
    found: dict[str, Any] = json.loads(Path("run/recipe.json").read_text())
    return found


def test_an_argument_may_bear_the_name_of_an_option() -> None:
    typed = {"lr": 2, "out": 3, "name": "x", "help": 1, "no_flip": 1, "opt": {"seed": 1}}
    words = [word for name, value in typed.items() for word in (f"--model-args.{name}", json.dumps(value))]
    recipe = recipe_of(*NET, *words, "--data-args.seed", "5", "--data-args.batch-size=4", "--seed", "7")
    assert recipe["model_args"] == typed
    assert recipe["data_args"] == {"seed": 5, "batch_size": 4}
    assert (recipe["lr"], recipe["name"], recipe["seed"], recipe["batch_size"]) == (3e-3, "digits_vit", 7, 16)


def test_two_fields_may_have_arguments_of_one_name(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*NET, "--init", "own.py:weak", "--model-args.scale", "2", "--init-args.scale", "0.3"]
    recipe = recipe_of(*words)
    assert (recipe["model_args"], recipe["init_args"]) == ({"scale": 2}, {"scale": 0.3})
    assert main([*words, "--scale", "3"]) == 2
    error = capsys.readouterr().err
    assert error == "espalier: unknown option --scale of train: write --init-args.scale or --model-args.scale\n"


def test_a_recipe_file_may_have_them_too() -> None:
    Path("mine.yaml").write_text("base: digits_vit\ndataset: own.py:noise\nmodel: own.py:Net\ndata_args: {seed: 1}\n")
    Path("mine.yaml").write_text(Path("mine.yaml").read_text() + "model_args: {name: x}\n")
    recipe = recipe_of("train", "mine.yaml", "--seed", "3")
    assert (recipe["data_args"], recipe["model_args"], recipe["seed"]) == ({"seed": 1}, {"name": "x"}, 3)


def test_an_unknown_argument_with_the_name_of_an_option_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "digits_vit", "--model-args.name", "x", "--out", "study"]) == 2
    error = capsys.readouterr().err
    assert "unknown argument of model 'vit' 'name'" in error
    assert error.count("\n") == 1


def test_a_recipes_own_keywords_have_short_names() -> None:
    found = parse("train", COMMANDS["train"], ["digits_vit", "--depth", "2", "--model-args.mlp-ratio", "2.0"])
    expected = {**get_recipe("digits_vit").model_args, "depth": 2, "mlp_ratio": 2.0}
    assert found["recipe"].model_args == expected


@pytest.mark.parametrize("short", [["--depth", "2"], ["--depth=2"]])
def test_one_argument_in_two_spellings_is_refused(short: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "digits_vit", *short, "--model-args.depth", "3"]) == 2
    error = capsys.readouterr().err
    assert error == "espalier: --depth and --model-args.depth set the same argument: write one of them\n"
