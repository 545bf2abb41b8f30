"""A file that shapes a trial is part of what the trial is: its content, not its name."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import espalier
from espalier.errors import EspalierError
from espalier.init import FilterStatistics
from espalier.models import ConvMixer
from espalier.recipes import Recipe, get_recipe
from espalier.recipes.validation import resolve_recipe
from espalier.study import launch, load_study, plan_study, summarise
from espalier.study.record import known_digests, recipe_digest
from espalier.train import load_run, train

RECIPE = replace(
    get_recipe("digits_convmixer"), epochs=1, data_args={"train_limit": 64, "test_limit": 50}, batch_size=32, threads=1,
    model_args={"dim": 8, "depth": 1, "kernel_size": 3, "patch_size": 2},
)  # fmt: skip


def _statistics(file: Path, seed: int) -> str:
    torch.manual_seed(seed)
    FilterStatistics.from_model(ConvMixer(dim=64, depth=1, kernel_size=3, patch_size=2, in_chans=1)).save(file)
    return str(file)


def _from(file: str) -> Recipe:
    return replace(RECIPE, init="transferred", init_args={"statistics": file})


def test_one_arm_does_not_mix_trials_of_two_files(tmp_path: Path) -> None:
    recipe = _from(file := _statistics(tmp_path / "s.safetensors", 0))
    options = {"arms": ["default", "transferred"], "lrs": [1e-3], "out": tmp_path / "s", "workers": 0}
    first = espalier.compare(recipe, seeds=1, **options)
    shutil.copy(file, tmp_path / "kept")
    plan = (tmp_path / "s/study.json").read_bytes()
    _statistics(tmp_path / "s.safetensors", 1)
    with pytest.raises(EspalierError, match=r"init_args is .*s\.safetensors#[0-9a-f]{12}.* there and .* here"):
        espalier.compare(recipe, seeds=2, **options)
    assert (tmp_path / "s/study.json").read_bytes() == plan
    study = load_study(tmp_path / "s")
    assert len(launch(replace(study, seeds=(0, 1)), workers=0)) == 1  # the arm that reads it
    failed = (tmp_path / "s/trials/transferred/lr=0.001/seed=1/failure.txt").read_text()
    assert failed.startswith(f"init_args: {file} is not the file that this was planned or trained with (")
    assert failed.endswith("): put it back, or start in another folder\n")
    shutil.copy(tmp_path / "kept", file)
    second = espalier.compare(recipe, seeds=2, **options)
    assert [arm.finished for arm in second.arms] == [2, 2]
    assert second.arms[1].rates[0].scores[0] == first.arms[1].rates[0].scores[0]
    assert load_run(tmp_path / "s/trials/transferred/lr=0.001/seed=0").model() is not None


def test_a_digest_counts_what_a_file_holds_and_not_its_name(tmp_path: Path) -> None:
    one, other = _statistics(tmp_path / "one.safetensors", 0), _statistics(tmp_path / "other.safetensors", 1)
    (tmp_path / "folder").mkdir()
    moved = shutil.copy(one, tmp_path / "folder/renamed.safetensors")
    digests = [recipe_digest(resolve_recipe(_from(str(file)))) for file in (one, moved, other)]
    assert digests[0] == digests[1] != digests[2]
    resolved = resolve_recipe(_from(one))
    assert resolve_recipe(resolved) == resolved
    # Records of earlier versions knew the name alone.
    assert known_digests(resolved) == (digests[0], recipe_digest(_from(one)))
    assert known_digests(RECIPE) == (recipe_digest(RECIPE),)


def test_an_earlier_versions_record_of_such_a_trial_still_counts(tmp_path: Path) -> None:
    recipe = _from(_statistics(tmp_path / "s.safetensors", 0))
    options = {"arms": ["transferred"], "lrs": [1e-3], "workers": 0}
    made = espalier.compare(recipe, out=tmp_path / "a", seeds=1, **options)
    (record,) = made.records.values()
    old = replace(record, digest=recipe_digest(replace(recipe, lr=1e-3)))
    study = plan_study(recipe, ["transferred"], [1e-3], [0], tmp_path / "b")
    assert study.with_records([old]).trials()[0].record == old
    assert summarise(study.with_records([old])).arms[0].finished == 1


def test_a_plan_of_an_earlier_version_is_read_and_not_trained_further(tmp_path: Path) -> None:
    recipe = _from(_statistics(tmp_path / "s.safetensors", 0))
    study = plan_study(recipe, ["transferred"], [1e-3], [0], tmp_path / "s")
    plan = json.loads((tmp_path / "s/study.json").read_text())
    plan["recipe"]["init_args"] = dict(recipe.init_args)
    del plan["digest"]
    (tmp_path / "s/study.json").write_text(json.dumps(plan))
    assert load_study(study.path).recipe != study.recipe
    with pytest.raises(EspalierError, match="init_args of arm 'transferred' name a file that the plan does not pin"):
        launch(load_study(study.path), workers=0)


def test_files_of_the_users_own_functions_are_pinned_however_deep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ESPALIER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "nets.py").write_text(
        "from safetensors.torch import load_file\nfrom torch import nn\n"
        "def net(num_classes, parts, kind):\n"
        "    assert kind == 'kind'\n"
        "    net = nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))\n"
        "    net[1].load_state_dict(load_file(parts['files'][0]))\n"
        "    return net\n"
    )
    (tmp_path / "kind").touch()  # a bare word stays a word
    save_file({"weight": torch.zeros(10, 64), "bias": torch.ones(10)}, tmp_path / "w.safetensors")
    arguments = {"parts": {"files": ["./w.safetensors", 3]}, "kind": "kind"}
    recipe = replace(RECIPE, model="nets.py:net", model_args=arguments, normalize="none")
    run = train(recipe, tmp_path / "run", progress=False)
    pinned, number = run.recipe.model_args["parts"]["files"]
    assert pinned.startswith("./w.safetensors#")
    assert (number, run.recipe.model_args["kind"]) == (3, "kind")
    assert run.model() is not None
    save_file({"weight": torch.zeros(10, 64), "bias": torch.zeros(10)}, tmp_path / "w.safetensors")
    with pytest.raises(EspalierError, match=r"model_args: \./w\.safetensors is not the file that this was planned or"):
        load_run(tmp_path / "run").model()
    with pytest.raises(EspalierError, match=r"model_args is .* there and .* here; choose another folder"):
        train(recipe, tmp_path / "run", progress=False)
