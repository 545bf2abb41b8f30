"""A study that is really trained: two arms, two rates and two seeds of a small transformer on a few digits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from espalier.recipes import get_recipe
from espalier.study import Study, launch, plan_study


def train_study(path: Path) -> Study:
    """Train it into ``path``; eight runs of a second."""
    limits = {"train_limit": 128, "test_limit": 50}
    recipe = replace(get_recipe("digits_vit"), epochs=2, data_args=limits, threads=1)
    study = plan_study(recipe, ["default", "mimetic"], [3e-4, 3e-3], [0, 1], path)
    launch(study, workers=0)
    return study


def recorded(study: Study) -> dict[tuple[str, float, int], list[float]]:
    """Return the test accuracy after every epoch by arm, rate and seed, from the runs' own files."""
    found = {}
    for trial in study.trials():
        rows = [json.loads(line) for line in (trial.path / "metrics.jsonl").read_text().splitlines()]
        found[trial.arm, trial.lr, trial.seed] = [row["test/accuracy"] for row in rows]
    return found
