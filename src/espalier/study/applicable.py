"""Which arms a recipe's model has a place for, and whether every arm of a study can be trained at all."""

from __future__ import annotations

from torch import Tensor

from espalier.data.source import Source
from espalier.errors import EspalierError
from espalier.recipes import ARMS, Recipe, apply_arm
from espalier.recipes.validation import recipe_to_dict
from espalier.study.trial import Study
from espalier.train.build import build_run_model, build_run_source, freeze_
from espalier.train.loggers import check_logger
from espalier.train.losses import build_loss


def applicable_arms(recipe: Recipe) -> list[str]:
    """Return every arm that applies to a recipe's model and differs from the arms before it, the default first.

    Each arm is tried on the model that a trial of it would train: one that finds nothing to write or to freeze is left
    out, and so is one that writes the very weights of an earlier arm (``structured`` on a model with one family).

    Raises:
        EspalierError: the recipe's data or model cannot be built.
    """
    source = build_run_source(recipe)
    build_run_model(apply_arm(recipe, "default"), source)
    names: list[str] = []
    states: list[list[tuple[Tensor, bool]]] = []
    for arm in ARMS:
        try:
            model, _ = build_run_model(apply_arm(recipe, arm), source)
            freeze_(model, apply_arm(recipe, arm))
        except EspalierError:
            continue
        state = [(parameter.detach(), parameter.requires_grad) for parameter in model.parameters()]
        if not any(all(a.equal(b) and x == y for (a, x), (b, y) in zip(state, s, strict=True)) for s in states):
            names.append(arm)
            states.append(state)
    return names


def check_arms(study: Study) -> None:
    """Build the data and the model of every arm that has trials to run, before any worker starts.

    Raises:
        EspalierError: an arm that cannot be trained; the message names it.
    """
    shared = {"lr", "seed", "init", "init_args", "freeze"}  # what shapes no data
    sources: dict[str, Source] = {}
    checked: set[str] = set()
    for trial in study.trials():
        recipe = trial.recipe
        if not isinstance(recipe, Recipe) or trial.arm in checked or trial.finished:
            continue
        checked.add(trial.arm)
        try:
            key = repr([value for name, value in recipe_to_dict(recipe).items() if name not in shared])
            if key not in sources:
                sources[key] = build_run_source(recipe)
            build_loss(recipe)
            check_logger(recipe)
            model, _ = build_run_model(recipe, sources[key])
            freeze_(model, recipe)
        except EspalierError as error:
            raise EspalierError(f"arm {trial.arm!r}: {error}") from error
