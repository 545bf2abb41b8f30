"""Compare anything: recipes, or any function that trains, arm by arm, over learning rates and paired seeds."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from espalier.data.source import Source
from espalier.errors import EspalierError
from espalier.files import write_bytes
from espalier.recipes import ARMS, Recipe, apply_arm
from espalier.recipes.validation import recipe_to_dict
from espalier.study.launcher import check_launch, launch, refuse_torchrun, run_recipe
from espalier.study.own_training import OwnTraining, TrainFunction, read_scores
from espalier.study.record import record_scores
from espalier.study.same_data import data_key, refuse_other_data
from espalier.study.summary import Summary, summarise
from espalier.study.training_parts import leave_behind
from espalier.study.trial import FILES, RECORD, RECORDS, STUDY, Arms, Study, Trial, draft_study, load_study, save_study
from espalier.study.worker import RunTrial
from espalier.train.build import build_run_model, build_run_source
from espalier.train.loggers import check_logger
from espalier.train.requests import Requests


def compare(
    train: TrainFunction | Recipe,
    *,
    arms: Arms,
    out: Path | str,
    lrs: Sequence[float] | Literal["auto"] = "auto",
    seeds: int | Sequence[int] = 5,
    workers: int = 2,
    cluster: Literal["local", "slurm"] = "local",
    parameters: Mapping[str, Any] | None = None,
    metric: str | None = None,
    lr: float | None = None,
    keep_trials: bool = False,
    progress: bool | None = None,
) -> Summary:
    """Train every arm at every learning rate and seed, and return what was found; call it again to resume.

    ``train(arm, lr, seed, folder)`` returns a score (larger is better) or a curve, a list of (step, score) whose last
    score counts; one that is not finite says that the run diverged. It gets the same folder when it is called again
    after a kill, and may keep checkpoints there. Arms of one seed are paired: let what they share (weights, batches)
    depend on the seed alone. A trial that raises is reported and the others go on.

    Args:
        train: a function, which may stand in a script or a notebook; or a recipe.
        arms: names, the baseline first; of a recipe, as ``plan_study`` takes them.
        out: the study folder: made, or extended by new arms, rates and seeds.
        lrs: learning rates, or ``"auto"`` for five, √10 apart.
        seeds: how many, from 0; or the seeds themselves.
        workers: processes here, or Slurm jobs; 0 runs in this process.
        cluster: ``"local"`` or ``"slurm"``.
        parameters: of the Slurm jobs, see ``launch``.
        metric: name of what a function returns ("score" by default); shares of one end in ``accuracy``.
        lr: centre of an ``"auto"`` grid for a function (1e-3 by default); a recipe has its own.
        keep_trials: keep the trials of a folder though the function, or what it uses, has changed since: say so where
            they would end as they did, because you added an arm, say.
        progress: print one line of progress; None prints it where standard error is a terminal.

    Raises:
        EspalierError: bad arguments, an arm that the recipe's model has no place for, a folder of another study, or a
            worker that died.
        RunInterrupted: stopped from the keyboard.
    """
    refuse_torchrun()
    training, run = _described(train, out, metric, lr, keep_trials)
    # Absolute, as a training may change the working directory.
    study = draft_study(training, arms, lrs, seeds, Path(out).absolute())
    check_launch(study, workers=workers, cluster=cluster, parameters=parameters, run=run)
    _check_arms(study)
    study = save_study(study)  # last: what is refused leaves no plan behind, and extends none
    try:
        launch(study, workers=workers, cluster=cluster, parameters=parameters, run=run, progress=progress)
    finally:
        if isinstance(training, OwnTraining) and not workers:
            leave_behind(train, training.parts)
    return summarise(study)


def _described(
    train: TrainFunction | Recipe, out: Path | str, metric: str | None, lr: float | None, keep_trials: bool
) -> tuple[Recipe | OwnTraining, RunTrial]:
    """Return what is known of a training (a function's under the code of its study's trials), and what runs it."""
    if isinstance(train, Recipe):
        own = {"metric": metric is not None, "lr": lr is not None, "keep_trials": keep_trials}
        if given := [name for name, is_given in own.items() if is_given]:
            raise EspalierError(f"{given[0]} belongs to a training function: leave it out with a recipe")
        return train, run_recipe
    training = OwnTraining.of(train, metric or "score", 1e-3 if lr is None else lr)
    if (Path(out) / STUDY).exists() and isinstance(there := load_study(out).recipe, OwnTraining):
        training = training.continues(there, keep_trials)
    return training, partial(_run_function, train)


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
        except EspalierError:
            continue
        state = [(parameter.detach(), parameter.requires_grad) for parameter in model.parameters()]
        if not any(all(a.equal(b) and x == y for (a, x), (b, y) in zip(state, s, strict=True)) for s in states):
            names.append(arm)
            states.append(state)
    return names


def _check_arms(study: Study) -> None:
    """Build the data and the model of every arm that has trials to run, before any worker starts.

    Raises:
        EspalierError: an arm that cannot be trained; the message names it. Or the data are not those of a trial that
            has begun, here or elsewhere: the trials of a study would differ by them, too.
    """
    sources: dict[str, Source] = {}
    here: dict[str, Source] = {}
    checked: set[str] = set()
    for trial in study.trials():
        recipe = trial.recipe
        if not isinstance(recipe, Recipe) or trial.arm in checked or trial.finished:
            continue
        checked.add(trial.arm)
        try:
            key = _source_key(recipe)
            if key not in sources:
                sources[key] = build_run_source(recipe)
                here.setdefault(data_key(recipe), sources[key])
            check_logger(recipe)
            build_run_model(recipe, sources[key])
        except EspalierError as error:
            raise EspalierError(f"arm {trial.arm!r}: {error}") from error
    if here:
        refuse_other_data(study.trials(), here, study.path / RECORDS)


def _source_key(recipe: Recipe) -> str:
    """Return a text that is the same for recipes that read their data alike."""
    shared = {"lr", "seed", "init", "init_args", "freeze"}  # what shapes no data
    return repr([value for name, value in recipe_to_dict(recipe).items() if name not in shared])


def _run_function(train: TrainFunction, trial: Trial) -> None:
    """Run a trial of the user's own training and leave its record."""
    assert isinstance(trial.recipe, OwnTraining)
    folder = trial.path / FILES
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    requests = Requests()
    try:
        with requests:
            returned = train(trial.arm, trial.lr, trial.seed, folder)
    finally:
        # Many a training loop catches Ctrl-C, and returns or raises what it had reached: that is no outcome.
        if requests.signal is not None:
            raise requests.interruption(f"{trial} is not finished")
    curve = read_scores(returned, trial.recipe.metric)
    record = record_scores(trial.recipe, trial.arm, trial.lr, trial.seed, curve, time.perf_counter() - started)
    write_bytes(trial.path / RECORD, record.line().encode())
