"""What a study consists of: arms × learning rates × seeds, each a run folder of its own."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from espalier.errors import EspalierError
from espalier.files import write_json
from espalier.recipes import Recipe, apply_arm
from espalier.recipes.validation import first_difference, recipe_from_dict, recipe_to_dict, resolve_recipe

STUDY, TRIALS, FAILURE, RESULT = "study.json", "trials", "failure.txt", "result.json"

# Steps of √10 around the recipe's own rate: a factor of 100 in all, fine enough to see where a window ends.
_AUTO_STEPS = (-2, -1, 0, 1, 2)


@dataclass(frozen=True)
class Trial:
    """One run of a study: its resolved recipe and its folder."""

    recipe: Recipe
    arm: str
    lr: float
    seed: int
    path: Path

    @property
    def finished(self) -> bool:
        """Whether the run has a result (a diverged run has one)."""
        return (self.path / RESULT).exists()

    @property
    def failure(self) -> str | None:
        """The text of the error that ended the last attempt, if one did."""
        try:
            return None if self.finished else (self.path / FAILURE).read_text()
        except FileNotFoundError:
            return None

    def __str__(self) -> str:
        return f"{self.arm} lr={self.lr:g} seed={self.seed}"


@dataclass(frozen=True)
class Study:
    """A plan: every arm at every rate and seed; the first arm is the baseline.

    ``arms`` maps each arm to the recipe fields that it changes, so that a study folder explains itself.
    """

    path: Path
    recipe: Recipe
    arms: Mapping[str, Mapping[str, Any]]
    lrs: tuple[float, ...]
    seeds: tuple[int, ...]

    def trials(self) -> tuple[Trial, ...]:
        """Return every trial, seed by seed: a study that is cut short has compared all arms on its first seeds."""
        return tuple(self.trial(arm, lr, seed) for seed in self.seeds for lr in self.lrs for arm in self.arms)

    def trial(self, arm: str, lr: float, seed: int) -> Trial:
        """Return one trial."""
        recipe = recipe_from_dict({**recipe_to_dict(self.recipe), **self.arms[arm], "lr": lr, "seed": seed})
        return Trial(recipe, arm, lr, seed, self.path / TRIALS / arm / f"lr={lr:g}" / f"seed={seed}")


def plan_study(
    recipe: Recipe,
    arms: Sequence[str],
    lrs: Sequence[float] | Literal["auto"],
    seeds: Sequence[int],
    out: Path | str,
) -> Study:
    """Write the plan of a study into ``out``, or extend the one that is there by new arms, rates and seeds.

    Nothing is trained. The recipe's own ``lr`` is the centre of an ``"auto"`` grid and its ``seed`` is not used.
    Trials that the folder already has stay part of the study; the first arm named here is the baseline.

    Args:
        recipe: what all arms share.
        arms: names of ``espalier.recipes.ARMS``, the baseline first.
        lrs: peak learning rates, or ``"auto"`` (see ``learning_rates``).
        seeds: seeds that every arm shares, so that differences are paired.
        out: the study folder; made when missing.

    Raises:
        EspalierError: an unknown arm, a bad rate or seed, or a folder that holds something else.
    """
    out, recipe = Path(out), resolve_recipe(recipe)
    rates, numbers = learning_rates(recipe.lr, lrs), _seeds(seeds)
    if not arms:
        raise EspalierError("arms is empty: name at least one, the baseline first")
    changes: dict[str, Mapping[str, Any]] = {arm: _changes(recipe, arm) for arm in arms}
    if (out / STUDY).exists():
        there = load_study(out)
        _refuse_another(there, recipe, changes)
        changes = {**changes, **there.arms}
        rates, numbers = {*rates, *there.lrs}, {*numbers, *there.seeds}
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise EspalierError(f"out {out} exists and is not a study folder: choose another folder")
    study = Study(out, recipe, changes, tuple(sorted(rates)), tuple(sorted(numbers)))
    for trial in study.trials():
        resolve_recipe(trial.recipe)
    _write(study)
    return study


def load_study(path: Path | str) -> Study:
    """Read the plan of a study folder.

    Raises:
        EspalierError: there is none, or it is damaged.
    """
    path = Path(path)
    file = path / STUDY
    try:
        plan = json.loads(file.read_text())
        recipe = recipe_from_dict(plan["recipe"], where=f"{file}: recipe")
        known = {field.name for field in fields(Recipe)}
        if not all(set(changes) <= known for changes in plan["arms"].values()):
            raise KeyError("a field that no recipe has")
        return Study(path, recipe, dict(plan["arms"]), tuple(map(float, plan["lrs"])), tuple(map(int, plan["seeds"])))
    except OSError as error:
        raise EspalierError(f"{path} is not a study folder: it has no {STUDY}") from error
    except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise EspalierError(f"{file} is damaged ({error}): plan the study in another folder") from error


def learning_rates(centre: float, lrs: Sequence[float] | Literal["auto"]) -> set[float]:
    """Return the rates to try; ``"auto"`` is five, √10 apart and centred on the recipe's own, to two digits.

    Rates are kept to the six digits that folder names show.

    Raises:
        EspalierError: no rate, or one that is not a positive number.
    """
    if lrs == "auto":
        return {float(f"{centre * 10 ** (step / 2):.2g}") for step in _AUTO_STEPS if step} | {float(f"{centre:g}")}
    if isinstance(lrs, str) or not lrs:
        raise EspalierError(f"lrs {lrs!r}: give learning rates such as [1e-3, 3e-3], or 'auto'")
    for lr in lrs:
        if not (isinstance(lr, int | float) and math.isfinite(lr) and lr > 0):
            raise EspalierError(f"lrs: {lr!r} is no learning rate: give positive numbers, or 'auto'")
    return {float(f"{lr:g}") for lr in lrs}


def _seeds(seeds: Sequence[int]) -> set[int]:
    if not seeds or not all(isinstance(seed, int) and seed >= 0 for seed in seeds):
        raise EspalierError(f"seeds {list(seeds)}: give at least one, whole numbers from 0")
    return set(seeds)


def _changes(recipe: Recipe, arm: str) -> dict[str, Any]:
    """Return the fields that ``arm`` changes in ``recipe``, as plain JSON values."""
    before, after = recipe_to_dict(recipe), recipe_to_dict(resolve_recipe(apply_arm(recipe, arm)))
    return {name: value for name, value in after.items() if value != before[name]}


def _refuse_another(there: Study, recipe: Recipe, changes: Mapping[str, Mapping[str, Any]]) -> None:
    # The rate and the seed of the shared recipe belong to the trials.
    same = replace(recipe, lr=there.recipe.lr, seed=there.recipe.seed)
    name = first_difference(there.recipe, same)
    if name is not None:
        raise EspalierError(
            f"{there.path} holds a study of another recipe: {name} is {getattr(there.recipe, name)!r} there and "
            f"{getattr(same, name)!r} here; choose another folder"
        )
    for arm in changes:
        if arm in there.arms and there.arms[arm] != changes[arm]:
            raise EspalierError(
                f"{there.path} holds a study whose arm {arm!r} changes {there.arms[arm]}, not {changes[arm]}: "
                "choose another folder"
            )


def _write(study: Study) -> None:
    study.path.mkdir(parents=True, exist_ok=True)
    arms = {arm: dict(changes) for arm, changes in study.arms.items()}
    plan = {"recipe": recipe_to_dict(study.recipe), "arms": arms, "lrs": study.lrs, "seeds": study.seeds}
    write_json(study.path / STUDY, plan)
