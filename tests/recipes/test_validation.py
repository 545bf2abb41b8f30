from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from espalier.cli.main import main
from espalier.errors import EspalierError
from espalier.recipes import Recipe
from espalier.recipes.files import open_recipe, read_yaml
from espalier.recipes.validation import (
    first_difference,
    from_values,
    load_recipe,
    recipe_to_dict,
    resolve_recipe,
    save_recipe,
)
from espalier.study.record import record_from_line
from train.standins import recipe

FULL = recipe(
    betas=(0.8, 0.95),
    randaugment=(2, 12),
    crop_scale=(0.75, 1),
    init_args={"qk": (0.7, 0.7), "nested": {"sizes": [1, 2]}},
    data_path="somewhere",
    lr=1,
)


@pytest.mark.parametrize("depth", [300, 500, 700, 900])
def test_deeply_nested_fields_are_refused_by_name(tmp_path: Path, depth: int) -> None:
    """Python's own reader stops later than what checks and shows a value."""
    deep = "[" * depth + "]" * depth
    (tmp_path / "r.json").write_text(f'{{"name": "r", "data_args": {{"a": {deep}}}, "lr": {deep}}}')
    with pytest.raises(EspalierError, match=r"r\.json.*: field '(lr|data_args)' is ") as caught:
        open_recipe(str(tmp_path / "r.json"))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="field 'study' is "):
        record_from_line(f'{{"study": {deep}}}')


def test_a_recipe_comes_back_equal_with_its_tuples(tmp_path: Path) -> None:
    resolved = resolve_recipe(FULL)
    save_recipe(resolved, tmp_path / "recipe.json")
    back = load_recipe(tmp_path / "recipe.json")
    assert back == resolved
    assert back.randaugment == (2, 12)
    assert back.betas == (0.8, 0.95)
    assert back.init_args == {"qk": (0.7, 0.7), "nested": {"sizes": (1, 2)}}
    assert (back.lr, type(back.lr)) == (1.0, float)
    assert first_difference(back, resolved) is None
    assert first_difference(back, replace(back, seed=3)) == "seed"
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lrr": 1.0}, "unknown field 'lrr': did you mean 'lr'"),
        ({"lr": "fast"}, "field 'lr' is 'fast': str is neither float or int"),
        ({"epochs": 2.5}, "field 'epochs' is 2.5: float is not an instance of int"),
        ({"flip": 1}, "field 'flip' is 1: int is not an instance of bool"),
        ({"seed": True}, "field 'seed' is True"),
        ({"schedule": "cosin"}, r"not any of \('cosine', 'piecewise', 'constant'\)"),
        ({"betas": [0.9]}, "field 'betas'"),
        ({"model_args": 3}, "field 'model_args'"),
        ({"betas": [0.9, True]}, "field 'betas'"),
        ({"crop_scale": [0.5, "1"]}, "item 1 of tuple is neither float or int"),
        ({"randaugment": [2, 12.5]}, "field 'randaugment'"),
        ({"model": "subprocess:getoutput"}, "field 'model' names code, .*, and not which version"),
    ],
)
def test_bad_fields_are_named_in_one_line(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"name": "x", **change}))
    with pytest.raises(EspalierError, match=message) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", "{}", None])
def test_bad_files_are_named(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "recipe.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(EspalierError, match=r"recipe\.json"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": -1.0}, "lr -1.0 must be positive"),
        ({"lr": float("nan")}, "lr"),
        ({"epochs": 0}, "epochs 0"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"batch_size": 9, "accumulate": 2}, "batch_size 9 is not divisible by accumulate 2"),
        ({"warmup_epochs": 5.0}, "warmup_epochs 5.0 is longer than the 4 epochs"),
        ({"schedule": "piecewise", "warmup_epochs": 1.0}, "warm-up of its own"),
        ({"model_args": {"act": object()}}, "model_args"),
        ({"clip_norm": -1.0}, "clip_norm"),
        ({"weight_decay": float("nan")}, "weight_decay"),
        ({"mixup": float("inf")}, "mixup"),
        ({"eval_batch_size": 10**30}, "eval_batch_size.*18 digits"),
        ({"model_args": {"depths": [2, -(2**63)]}}, "model_args.*18 digits"),
        # What would run on without end, or build nothing.
        ({"mixup": 1e308}, "mixup 1e.308 is too large: give at most 1000"),
        ({"cutmix": 1001.0}, "cutmix 1001.0 is too large"),
        ({"threads": 2**31}, "threads 2147483648 is too large: give at most 1024"),
        ({"threads": 100_000}, "threads 100000 is too large"),
        ({"randaugment": (1_000_000, 12)}, "randaugment .1000000, 12.: give 1 to 100 operations"),
        ({"model_args": {"depth": 1_000_000}}, "depth 1000000 is no size of a model"),
        ({"model_args": {"depth": -1}}, "depth -1 is no size of a model: give a whole number from 0 to 10000"),
        ({"model_args": {"depths": (2, -1)}}, "depths .2, -1. is no size"),
        ({"model_args": {"num_classes": 0}}, "num_classes 0 is no size of a model: give a whole number from 1"),
        ({"model_args": {"embed_dim": 0}}, "embed_dim 0"),
        ({"model": "sequence", "model_args": {"pattern": "mamba2*9999999 attention"}}, "pattern .* is too deep"),
        ({"model": "vit\0"}, "field 'model'.*without NUL"),
        ({"data_path": "a\0b"}, "field 'data_path'.*without NUL"),
        ({"init_args": {"statistics": ["a\0"]}}, "field 'init_args'.*without NUL"),
        ({"model": "\ud800.py:Net"}, "model .* holds characters that are no text"),
    ],
)
def test_values_no_run_can_have(changes: dict[str, object], message: str) -> None:
    with pytest.raises(EspalierError, match=message):
        resolve_recipe(recipe(**changes))


def test_values_at_the_bounds_and_nets_of_the_users_own_are_free(tmp_path: Path) -> None:
    resolve_recipe(recipe(mixup=1000.0, cutmix=1000.0, threads=1024, randaugment=(100, 12), model_args={"depth": 0}))
    (tmp_path / "nets.py").write_text("def net(depth=-1, num_classes=0): ...\n")
    own = recipe(model=f"{tmp_path / 'nets.py'}:net", model_args={"depth": -1, "num_classes": 0})
    assert resolve_recipe(own).model_args == {"depth": -1, "num_classes": 0}


@pytest.mark.parametrize("field", [field.name for field in fields(Recipe)])
def test_a_function_that_fills_a_field_with_anything_is_a_recipe_or_one_line(tmp_path: Path, field: str) -> None:
    values = ["None", "3", "'x'", "[1]", "{'a': 1}", "0.5", "True", "object()", "float('nan')", "(1, 2)", "{1}"]
    (tmp_path / "mine.py").write_text(
        "from dataclasses import replace\nfrom espalier.recipes import get_recipe\n"
        + "".join(f"def r{i}(): return replace(get_recipe('digits_vit'), {field}={v})\n" for i, v in enumerate(values))
    )
    refusals = []
    for index in range(len(values)):
        assert main(["train", f"{tmp_path}/mine.py:r{index}", "--epochs", "x"]) == 2  # and not 70, an error in espalier
        try:
            made = open_recipe(f"{tmp_path}/mine.py:r{index}")
        except EspalierError as error:
            refusals.append(str(error))
        else:
            assert made == from_values(Recipe, recipe_to_dict(made))
    assert refusals
    assert all(f"field {field!r}" in text and "\n" not in text for text in refusals)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("100", 100), ("0100", 100), ("-7", -7), ("+7", 7), ("0o17", 15), ("0x1F", 31), ("0", 0), ("1e-3", 1e-3),
        ("1.", 1.0), (".5", 0.5), ("-1.5E+3", -1500.0), ("089", 89), ("1:30", "1:30"), ("1:30.5", "1:30.5"),
        ("1_000", "1_000"), ("0b11", "0b11"), ('"100"', "100"), ("-.inf", -math.inf), ("true", True), ("x1", "x1"),
    ],
)  # fmt: skip
def test_numbers_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    found = read_yaml(f"a: {text}", "r.yaml")["a"]
    assert found == value
    assert type(found) is type(value)


def test_a_time_is_no_number_of_epochs(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("base: digits_vit\nepochs: 1:30\n")
    with pytest.raises(EspalierError, match="field 'epochs' is '1:30'"):
        open_recipe(str(tmp_path / "r.yaml"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("r.json", '{"base": "digits_vit", "lr": 1, "lr": 2}'),
        ("r.json", '{"model_args": {"depth": 1, "depth": 2}}'),
        ("r.yaml", "base: digits_vit\nlr: 1\nlr: 2\n"),
        ("r.yaml", "model_args:\n  depth: 1\n  depth: 2\n"),
        ("r.yaml", "model_args: {depth: 1, depth: 2}\n"),
    ],
)
def test_a_key_that_stands_in_a_file_twice_is_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(EspalierError, match=r"'(lr|depth)' stands there twice") as caught:
        open_recipe(str(tmp_path / name))
    assert "\n" not in str(caught.value)
    if name.endswith("json"):
        with pytest.raises(EspalierError, match="stands there twice"):
            load_recipe(tmp_path / name)
