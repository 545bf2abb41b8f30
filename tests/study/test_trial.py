from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from espalier.errors import EspalierError
from espalier.recipes import Recipe, apply_arm
from espalier.study import load_study, plan_study
from espalier.study.grid import learning_rates

RECIPE = Recipe(name="r", lr=1e-3, epochs=2)


def test_trials_are_the_product_and_carry_resolved_recipes(tmp_path: Path) -> None:
    study = plan_study(RECIPE, ["default", "covariance-frozen"], [1e-3, 3e-3], [0, 7], tmp_path / "s")
    trials = study.trials()
    assert len({trial.path for trial in trials}) == len(trials) == 8
    assert {(trial.arm, trial.lr, trial.seed) for trial in trials} == {
        (arm, lr, seed) for arm in ("default", "covariance-frozen") for lr in (1e-3, 3e-3) for seed in (0, 7)
    }
    for trial in trials:
        assert trial.recipe == replace(apply_arm(RECIPE, trial.arm), lr=trial.lr, seed=trial.seed)
        assert trial.path == tmp_path / "s" / "trials" / trial.arm / f"lr={trial.lr:g}" / f"seed={trial.seed}"
    # The first seed of everything comes first, so that a short study compares all arms.
    assert {trial.seed for trial in trials[:4]} == {0}


def test_a_plan_reads_back_and_explains_itself(tmp_path: Path) -> None:
    study = plan_study(RECIPE, ["default", "mimetic"], [1e-3], [0], tmp_path)
    assert load_study(tmp_path) == study
    assert json.loads((tmp_path / "study.json").read_text())["arms"] == {"default": {}, "mimetic": {"init": "mimetic"}}
    assert {path.name for path in tmp_path.iterdir()} == {"study.json", ".study.json.lock"}


def test_auto_is_five_rates_a_root_of_ten_apart() -> None:
    assert sorted(learning_rates(1e-3, "auto")) == [1e-4, 3.2e-4, 1e-3, 3.2e-3, 1e-2]
    assert 0.00125 in learning_rates(0.00125, "auto")


def test_extension_keeps_what_is_there_and_takes_the_new_baseline(tmp_path: Path) -> None:
    plan_study(RECIPE, ["default", "mimetic"], [1e-3], [0, 1], tmp_path)
    wider = plan_study(replace(RECIPE, lr=5.0, seed=3), ["covariance", "mimetic"], [1e-2], [2], tmp_path)
    assert list(wider.arms) == ["covariance", "mimetic", "default"]
    assert wider.lrs == (1e-3, 1e-2)
    assert wider.seeds == (0, 1, 2)
    assert load_study(tmp_path) == wider


def test_a_study_goes_on_as_its_machine_s_owner_likes(tmp_path: Path) -> None:
    plan_study(RECIPE, ["default"], [1e-3], [0], tmp_path / "a")
    moved = plan_study(
        replace(RECIPE, threads=3, eval_batch_size=7, logger="csv"), ["default"], [1e-3], [1], tmp_path / "a"
    )
    assert {(trial.seed, trial.recipe.threads) for trial in moved.trials()} == {(0, 3), (1, 3)}
    (tmp_path / "mine.py").write_text("def mine(data_path): ...\n")
    own = replace(RECIPE, dataset=f"{tmp_path / 'mine.py'}:mine", data_path="/a")
    plan_study(own, ["default"], [1e-3], [0], tmp_path / "b")
    with pytest.raises(EspalierError, match="data_path is '/a' there and '/b' here"):
        plan_study(replace(own, data_path="/b"), ["default"], [1e-3], [0], tmp_path / "b")


def test_a_study_of_another_recipe_is_refused_and_left_alone(tmp_path: Path) -> None:
    plan_study(RECIPE, ["default"], [1e-3], [0], tmp_path)
    before = (tmp_path / "study.json").read_bytes()
    with pytest.raises(EspalierError, match="epochs is 2 there and 3 here"):
        plan_study(replace(RECIPE, epochs=3), ["default"], [1e-3], [0], tmp_path)
    plan = json.loads(before)
    plan["arms"]["default"] = {"init": "mimetic"}
    (tmp_path / "study.json").write_text(json.dumps(plan))
    with pytest.raises(EspalierError, match=r"study.json is damaged"):
        load_study(tmp_path)
    del plan["digest"]  # as the oldest plans are
    (tmp_path / "study.json").write_text(json.dumps(plan))
    with pytest.raises(EspalierError, match="arm 'default' changes"):
        plan_study(RECIPE, ["default"], [1e-3], [0], tmp_path)


def test_values_that_no_plan_has_are_refused_without_a_digest_too(tmp_path: Path) -> None:
    plan_study(RECIPE, ["default"], [1e-3], [0], tmp_path / "study")
    file = tmp_path / "study/study.json"
    plan = json.loads(file.read_text())
    del plan["digest"]
    own = {"name": 1, "code": "", "metric": "score", "lr": 1e-3}
    wrong = (
        {"lrs": ["x"]}, {"lrs": [1e400]}, {"seeds": [-1]}, {"seeds": [0.5]}, {"arms": {"../../x": {}}}, {"arms": []},
        {"arms": {}}, {"lrs": [10**400]},
        {"arms": {"default": ["lr"]}}, {"recipe": []}, {"recipe": {"name": "r", "lr": "x"}}, {"more": 1},
        {"recipe": {**plan["recipe"], "model": "os:getcwd"}}, {"arms": {"default": {"init": "os:getcwd"}}},
    )  # fmt: skip
    for changed in [*({**plan, **changes} for changes in wrong), {"train": own, "arms": {}, "lrs": [1], "seeds": [0]}]:
        file.write_text(json.dumps(changed))
        with pytest.raises(EspalierError) as caught:
            load_study(tmp_path / "study")
        assert "\n" not in str(caught.value)
    file.write_text(json.dumps(plan))
    assert load_study(tmp_path / "study").arms == {"default": {}}


@pytest.mark.parametrize(
    ("arms", "lrs", "seeds", "message"),
    [
        (["defualt"], [1e-3], [0], "did you mean 'default'"),
        ([], [1e-3], [0], "arms is empty"),
        (["default"], [], [0], "lrs"),
        (["default"], [0.0], [0], "0.0 is no learning rate"),
        (["default"], [10**400], [0], "is no learning rate"),
        (["default"], [float("nan")], [0], "no learning rate"),
        (["default"], "all", [0], "'auto'"),
        (["default"], [1e-3], [], "seeds is empty: give how many"),
        (["default"], [1e-3], [-1], "seeds: -1 is no seed"),
        (["default"], [1e-3], [True], "seeds: True is no seed"),
        ("default", [1e-3], [0], "arms 'default': give a list of names"),
        (["default", "default"], [1e-3], [0], "'default' is named twice"),
        (["nowhere.py:mine"], [1e-3], [0], "init: there is no file .*nowhere.py"),
    ],
)
def test_bad_plans_are_one_line_and_leave_nothing(tmp_path, arms, lrs, seeds, message) -> None:
    with pytest.raises(EspalierError, match=message) as caught:
        plan_study(RECIPE, arms, lrs, seeds, tmp_path / "s")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "s").exists()


def test_folders_of_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(EspalierError, match="not a study folder"):
        plan_study(RECIPE, ["default"], [1e-3], [0], tmp_path)
    with pytest.raises(EspalierError, match="not a study folder"):
        load_study(tmp_path)
    for damaged in ("{", "[]", '{"recipe": {"name": "r"}, "arms": {"a": {"depht": 3}}, "lrs": [1], "seeds": [0]}'):
        (tmp_path / "study.json").write_text(damaged)
        with pytest.raises(EspalierError, match="damaged"):
            load_study(tmp_path)
