"""Ready-made studies: what they plan, and that their arms write what their names say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from espalier.cli.main import main
from espalier.data import build_source
from espalier.errors import EspalierError
from espalier.recipes import ARMS, apply_arm, get_recipe
from espalier.recipes.arms import SSM_PARTS, ssm_part_arms
from espalier.study import load_study, plan_study
from espalier.study.plan import SCALES, smallest_plan
from espalier.study.ready import READY, STATE_SIZES, demo_plans, ready_plans
from espalier.train.build import build_run_model

LAYER_PARTS = {
    "decay": ("A_log",),
    "delta": ("dt_proj.bias",),
    "correlate": ("x_proj.weight",),
    "convolution": ("conv1d.weight", "conv1d.bias"),
}


def changed_parameters(arm: str) -> set[str]:
    """Return the names of the parameters that an arm starts from other values than the default does."""
    recipe = get_recipe("copy_mamba1")
    recipe = replace(recipe, model_args={**recipe.model_args, "dim": 16})
    source = build_source(recipe)
    base, _ = build_run_model(apply_arm(recipe, "default"), source)
    model, _ = build_run_model(apply_arm(recipe, arm), source)
    pairs = zip(base.named_parameters(), model.named_parameters(), strict=True)
    return {name for (name, before), (_, after) in pairs if not torch.equal(before, after)}


def test_sixteen_combinations_of_parts_write_what_they_name() -> None:
    arms = ssm_part_arms()
    assert len(arms) == 15
    assert len({tuple(sorted(changes["init_args"].items(), key=str)) for changes in arms.values()}) == 15
    for arm in arms:
        parts = arm.removeprefix("ssm-").split("+")
        assert set(parts) <= set(SSM_PARTS)
        expected = {f"layers.{i}.mixer.{name}" for i in (0, 1) for part in parts for name in LAYER_PARTS[part]}
        assert changed_parameters(arm) == expected, arm


def test_arms_of_single_layers() -> None:
    whole = changed_parameters("mimetic-ssm")
    assert whole == changed_parameters("ssm-decay+delta+correlate")
    assert changed_parameters("mimetic-ssm-one") == {name for name in whole if name.startswith("layers.0.")}
    assert changed_parameters("mimetic-ssm-last") == {name for name in whole if name.startswith("layers.1.")}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", READY)
def test_plans_can_be_planned(name: str, scale: str, tmp_path: Path) -> None:
    plans = ready_plans(name, scale)  # type: ignore[arg-type]
    assert len({plan.name for plan in plans}) == len(plans)
    for plan in plans:
        baseline = "covariance" if name.startswith("filter-switches") else "default"
        assert plan.arms[0].removesuffix("-frozen") == baseline
        assert len(plan.seeds) >= 3
        study = plan_study(plan.recipe, plan.arms, plan.lrs, plan.seeds, tmp_path / plan.name)
        assert len(study.trials()) == len(plan.arms) * len(plan.lrs) * len(plan.seeds)
        small = smallest_plan(plan)
        assert (len(small.lrs), len(small.seeds), small.recipe.epochs) == (1, 1, 1)
        assert small.arms == plan.arms


def test_plans_ask_their_questions() -> None:
    (window,) = ready_plans("lr-window")
    assert len(window.lrs) >= 8
    assert (min(window.lrs), max(window.lrs)) == (1e-4, 1e-2)
    (parts,) = ready_plans("which-part")
    assert len(set(parts.arms)) == 16
    sizes = [plan.recipe.model_args["state_size"] for plan in ready_plans("state-capacity")]
    assert sizes == list(STATE_SIZES["cpu"])
    assert (sizes[0], sizes[-1]) == (8, 128)
    (layers,) = ready_plans("layers")
    assert [ARMS[arm]["init_args"].get("layers", "all") for arm in layers.arms[1:]] == [0, -1, "all"]
    (control,) = ready_plans("control")
    assert control.recipe.dataset == "tinyshakespeare"
    assert {"copy_mamba1"} <= {plan.recipe.name for plan in demo_plans()}


def test_unknown_studies_are_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(EspalierError, match="unknown study 'lr-windows': did you mean 'lr-window'"):
        ready_plans("lr-windows")
    with pytest.raises(EspalierError, match="unknown scale 'tpu'"):
        ready_plans("lr-window", "tpu")  # type: ignore[arg-type]
    assert main(["study", "capacity"]) == 2
    assert capsys.readouterr().err.startswith("espalier: unknown study 'capacity': did you mean 'state-capacity'")


def test_the_command_runs_a_study_to_its_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "lr-window", "--smallest", "--workers", "1", "--out", str(tmp_path / "s")]) == 0
    printed = capsys.readouterr().out
    assert "Learning-rate window" in printed
    assert "mimetic-ssm against default" in printed
    assert all(trial.finished for trial in load_study(tmp_path / "s" / "copy_mamba1").trials())
    assert (tmp_path / "s" / "report.html").stat().st_size > 1000
