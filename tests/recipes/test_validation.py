from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from espalier.errors import EspalierError
from espalier.recipes.validation import first_difference, load_recipe, resolve_recipe, save_recipe
from train.standins import recipe

FULL = recipe(
    betas=(0.8, 0.95),
    randaugment=(2, 12),
    crop_scale=(0.75, 1),
    init_args={"qk": (0.7, 0.7), "nested": {"sizes": [1, 2]}},
    data_path="somewhere",
    lr=1,
)


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
    ],
)
def test_values_no_run_can_have(changes: dict[str, object], message: str) -> None:
    with pytest.raises(EspalierError, match=message):
        resolve_recipe(recipe(**changes))
