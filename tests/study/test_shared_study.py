"""A study folder that several commands extend: none loses what another has planned, or compares other data."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import espalier
from espalier.errors import EspalierError
from espalier.recipes import Recipe, get_recipe
from espalier.study import load_study, plan_study
from espalier.study.trial import draft_study, save_study

RECIPE = replace(get_recipe("digits_vit"), epochs=1, batch_size=4, warmup_epochs=0.0)


def test_a_plan_made_meanwhile_stays(tmp_path: Path) -> None:
    """Between the look at the folder and its plan stand the models of all arms, which take seconds to build."""
    out = tmp_path / "s"
    drafts = [draft_study(RECIPE, ["default", arm], [lr], [seed], out) for arm, lr, seed in
              (("mimetic", 1e-3, 0), ("zero-output", 1e-2, 1))]  # fmt: skip
    first, second = map(save_study, drafts)
    assert list(first.arms) == ["default", "mimetic"]
    assert list(second.arms) == ["default", "zero-output", "mimetic"]
    assert (second.lrs, second.seeds) == ((1e-3, 1e-2), (0, 1))
    assert load_study(out) == second
    other = draft_study(replace(RECIPE, epochs=2), ["default"], [1e-3], [0], tmp_path / "t")
    plan_study(RECIPE, ["default"], [1e-3], [0], tmp_path / "t")
    with pytest.raises(EspalierError, match="holds another study: epochs is 1 there and 2 here"):
        save_study(other)


def _plan(arm: str, out: Path) -> None:
    plan_study(RECIPE, ["default", arm], [1e-3], [0], out)


def test_many_plans_at_once_are_one(tmp_path: Path) -> None:
    arms = ["mimetic", "zero-output", "truncated-normal", "uniform-values"]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_plan, args=(arm, tmp_path / "s")) for arm in arms]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * len(arms)
    assert set(load_study(tmp_path / "s").arms) == {"default", *arms}


def _photos(root: Path, count: int) -> Recipe:
    for label in range(2):
        (root / f"class{label}").mkdir(parents=True, exist_ok=True)
        for index in range(count):
            Image.new("RGB", (8, 8), (40 * index, 200 * label, 0)).save(root / f"class{label}" / f"{index}.png")
    return replace(RECIPE, dataset="folder", data_path=str(root), data_args={"size": 8})


@pytest.mark.parametrize(("arms", "seeds"), [(["default", "mimetic"], 1), (["default"], 2)])
def test_new_trials_on_other_data_are_not_compared_with_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arms: list[str], seeds: int
) -> None:
    monkeypatch.setenv("ESPALIER_CACHE", str(tmp_path / "cache"))
    recipe, out = _photos(tmp_path / "photos", 5), tmp_path / "s"
    options = {"lrs": [1e-3], "out": out, "workers": 0}
    before = espalier.compare(recipe, arms=["default"], seeds=1, **options)
    plan = (out / "study.json").read_bytes()
    _photos(tmp_path / "photos", 6)
    with pytest.raises(EspalierError, match=r"the data of .*seed=0 have changed since it was started"):
        espalier.compare(recipe, arms=arms, seeds=seeds, **options)
    assert (out / "study.json").read_bytes() == plan
    assert espalier.compare(recipe, arms=["default"], seeds=1, **options).arms == before.arms  # nothing to train
    for label in range(2):
        (tmp_path / "photos" / f"class{label}" / "5.png").unlink()
    assert all(arm.finished == seeds for arm in espalier.compare(recipe, arms=arms, seeds=seeds, **options).arms)
    # An arm with data of its own is not held to those of the others.
    _photos(tmp_path / "more", 7)
    own = {"other": {"data_path": str(tmp_path / "more")}}
    assert espalier.compare(recipe, arms=own, seeds=1, **options).arms[0].finished == seeds
