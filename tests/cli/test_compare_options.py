"""Every field of a recipe that is typed for ``compare`` shapes a trial, or is refused."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from espalier.cli.main import main
from espalier.cli.recipe_flags import refuse_unused_fields
from espalier.errors import EspalierError
from espalier.recipes import Recipe, get_recipe
from espalier.recipes.validation import resolve_recipe
from espalier.study.trial import draft_study

BASE = get_recipe("digits_vit")
OTHER = {
    "name": "other", "dataset": "cifar10", "data_path": "/x", "loss": "multi_margin", "model": "convmixer",
    "init": "mimetic", "freeze": "depthwise", "randaugment": (2, 9), "betas": (0.5, 0.5), "crop_scale": (0.5, 1.0),
    "schedule": "constant", "normalize": "none", "optimizer": "adam", "precision": "bf16", "logger": "csv",
    "label_smoothing": 0.1, "ema_decay": 0.5, "erasing": 0.5, "accumulate": 2,
}  # fmt: skip


def changed(name: str) -> Recipe:
    """Return the base with another value of one field."""
    old = getattr(BASE, name)
    value: Any = OTHER.get(name)
    if value is None:
        value = {"key": 1} if isinstance(old, dict) else not old if isinstance(old, bool) else type(old)(old + 1)
    return resolve_recipe(replace(BASE, **{name: value}))


@pytest.mark.parametrize("arms", [["default", "structured"], ["transferred"]])
@pytest.mark.parametrize("name", [field.name for field in fields(Recipe)])
def test_a_typed_field_shapes_a_trial_or_is_refused(name: str, arms: list[str], tmp_path: Path) -> None:
    typed = changed(name)
    assert getattr(typed, name) != getattr(BASE, name)
    study = draft_study(typed, arms, [1e-3], [0], tmp_path / "s")
    followed = any(getattr(trial.recipe, name) == getattr(typed, name) for trial in study.trials())
    if name in ("seed", "lr", "init", "freeze") or (name == "init_args" and "default" in arms):
        with pytest.raises(EspalierError, match=f"^--{name.replace('_', '-')} .*is not used by compare"):
            refuse_unused_fields(BASE, typed, arms, ["1e-3"])
    else:
        refuse_unused_fields(BASE, typed, arms, ["1e-3"])
        assert followed


def test_the_rate_is_the_centre_of_an_automatic_grid(tmp_path: Path) -> None:
    typed = changed("lr")
    refuse_unused_fields(BASE, typed, ["default"], ["auto"])
    assert typed.lr in draft_study(typed, ["default"], "auto", [0], tmp_path / "s").lrs


def test_statistics_are_an_init_for_the_arms_that_read_them(tmp_path: Path) -> None:
    typed = replace(BASE, init="transferred", init_args={"statistics": "/x/s.safetensors"})
    refuse_unused_fields(BASE, typed, ["default", "transferred"], ["auto"])
    with pytest.raises(EspalierError, match="--init transferred is not used"):
        refuse_unused_fields(BASE, typed, ["default", "covariance"], ["auto"])


def test_failed_trials_are_status_1_in_one_line_for_all_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A net that fails in training alone, so that no check before the launch can see it.
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self, num_classes):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(64, num_classes))\n"
        "    def forward(self, x):\n"
        "        if self.training: raise RuntimeError('not\\ntoday')\n"
        "        return super().forward(x)\n"
    )
    monkeypatch.chdir(tmp_path)
    command = ["compare", "digits_vit", "--model", "nets.py:Net", "--arms", "default", "--lrs", "1e-3", "1e-2"]
    with pytest.raises(SystemExit) as stop:
        main([*command, "--seeds", "3", "--workers", "0", "--epochs", "1", "--threads", "1"])
    assert stop.value.code == 1
    train = ["train", "digits_vit", "--model", "nets.py:Net", "--epochs", "1", "--threads", "1", "--quiet"]
    assert main(train) == 2
    error = capsys.readouterr()
    assert error.err == f"espalier: your code fails with RuntimeError: not today ({tmp_path / 'nets.py'}, line 6)\n"
    out = error.out
    assert out.count("today") == 1
    assert "6 trials failed, default lr=0.001 seed=0 first: RuntimeError: not today" in out
    plan = json.loads((tmp_path / "runs/compare-digits_vit/study.json").read_text())
    assert plan["recipe"]["model"].startswith(f"{tmp_path / 'nets.py'}:Net#")


def test_a_comparison_that_always_diverges_is_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["compare", "digits_vit", "--model-args.embed-dim", "12", "--arms", "default", "--lrs", "1e30"]
    with pytest.raises(SystemExit) as stop:
        main([*command, "--seeds", "1", "--workers", "0", "--epochs", "1", "--threads", "1"])
    assert stop.value.code == 1
    assert "every trial diverged: choose smaller --lrs" in capsys.readouterr().err


def test_torchrun_is_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert main(["compare", "digits_vit", "--arms", "default"]) == 2
    error = capsys.readouterr().err
    assert "run it without torchrun" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", ".", "..", "../..", "/tmp/evil", "a\\b"])
@pytest.mark.parametrize("command", ["train", "compare"])
def test_a_name_that_is_no_name_of_a_folder_is_refused(
    command: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main([command, "digits_vit", "--name", name, "--epochs", "1"]) == 2
    assert capsys.readouterr().err == f"espalier: name {name!r}: choose one that a folder can bear\n"
    assert [path.name for path in tmp_path.rglob("*")] == ["here"]
