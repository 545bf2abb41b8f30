"""Run folders as training leaves them, made without training: scores are a formula of (arm, rate, seed)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

from espalier.recipes import Recipe
from espalier.study import Trial
from espalier.train import save_recipe
from espalier.train.run import seal

Score = Callable[[Recipe], float]


def fabricate(
    recipe: Recipe, path: Path, score: float | None, *, start: float = 0.1, step_seconds: float = 0.01
) -> None:
    """Write a finished run whose accuracy climbs in a straight line from ``start`` to ``score``; None diverged."""
    path.mkdir(parents=True, exist_ok=True)
    save_recipe(recipe, path / "recipe.json")
    rows = []
    for epoch in range(recipe.epochs + 1):
        accuracy = None if score is None else start + (score - start) * epoch / recipe.epochs
        rows.append(
            {
                "epoch": epoch,
                "step": 20 * epoch,
                "lr": recipe.lr,
                "train_loss": None if epoch == 0 else 1 / epoch,
                "seconds": 0.2 * epoch,
                "step_seconds": step_seconds,
                "test/loss": None if accuracy is None else 1 - accuracy,
                "test/accuracy": accuracy,
            }
        )
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = {
        "score": score,
        "metric": "test/accuracy",
        "loss": None if score is None else 1 - score,
        "epochs": recipe.epochs,
        "steps": 20 * recipe.epochs,
        "seconds": 0.2 * recipe.epochs,
        "step_seconds": step_seconds,
        "diverged": score is None,
    }
    (path / "result.json").write_text(json.dumps(result))
    seal(path)


def usual_score(recipe: Recipe) -> float:
    """Return 0.8 at lr 1e-3, 4 points less a factor of ten away, 3 points more for a structured arm, ±1 by seed."""
    distance = abs(math.log10(recipe.lr) + 3)
    return 0.8 - 0.04 * distance + 0.03 * (recipe.init != "default") + 0.01 * (recipe.seed % 3 - 1)


def fabricate_usual(recipe: Recipe, path: Path) -> None:
    """Stand in for training."""
    fabricate(recipe, path, usual_score(recipe))


def fabricate_trial(trial: Trial) -> None:
    """Stand in for the training of a trial of a recipe."""
    assert isinstance(trial.recipe, Recipe)
    fabricate_usual(trial.recipe, trial.path)
