"""Train one plan in a process of its own: ``one_training.py FOLDER``, which holds ``plan.json``.

The number of epochs is what fits the plan's seconds: 30 steps are timed first, with whatever else the device does, and
the schedule is made for as many epochs as fit what is left after that and after a tenth in reserve.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from espalier.certify import certify
from espalier.data import build_source
from espalier.recipes import Recipe, apply_arm, get_recipe
from espalier.train import Run, train
from espalier.train.certify_runs import pixel_net

_PROBE_STEPS = 30
_RADII = (36, 72, 108)


def recipe_of(plan: dict[str, Any]) -> Recipe:
    """Return the plan's recipe."""
    recipe = get_recipe(plan["recipe"])
    changes = dict(plan["changes"])
    for name in ("data_args", "model_args"):
        if name in changes:
            changes[name] = {**getattr(recipe, name), **changes[name]}
    recipe = replace(recipe, **{**changes, "seed": plan["seed"], "threads": 1, "checkpoint_every": 1000})
    if plan["arm"] != plan["recipe"]:
        recipe = apply_arm(recipe, plan["arm"])
    if plan["data"] is not None and recipe.dataset == "cifar10":
        recipe = replace(recipe, data_path=str(Path(plan["data"]) / "cifar10"))
    return recipe


def seconds_per_epoch(recipe: Recipe, folder: Path) -> float:
    """Return the time of one epoch with its evaluation, from the median step of a short run."""
    generated = "steps_per_epoch" in recipe.data_args
    steps = build_source(recipe).steps_per_epoch(recipe.batch_size)
    few = (
        {"steps_per_epoch": _PROBE_STEPS}
        if generated
        else {"train_limit": recipe.batch_size * min(_PROBE_STEPS, steps)}
    )
    data_args = {**recipe.data_args, **few}
    probe = replace(recipe, epochs=1, warmup_epochs=0, schedule="constant", data_args=data_args)
    result = train(probe, folder, progress=False).result or {}
    # An evaluation is a forward pass over the test set, a third of a step's work for as many examples: not timed apart.
    evaluated = 10000 if not generated else 1000
    return result["step_seconds"] * (steps + evaluated / recipe.batch_size / 3 / recipe.eval_every)


def fitted(recipe: Recipe, plan: dict[str, Any], one_epoch: float, left: float, agreed: Path) -> Recipe:
    """Return the recipe with the number of epochs that fits, its warm-up in proportion."""
    epochs = max(1, int(0.9 * left / one_epoch))
    if plan["epochs"]:
        epochs = min(epochs, plan["epochs"])
    # Arms and seeds are compared at equal epochs: those of the first one that knows.
    try:
        with agreed.open("x") as file:
            file.write(str(epochs))
    except FileExistsError:
        epochs = int(agreed.read_text() or epochs)
    warmup = recipe.warmup_epochs * epochs / recipe.epochs
    return replace(recipe, epochs=epochs, warmup_epochs=warmup, eval_every=min(recipe.eval_every, epochs))


def certificate(run: Run) -> dict[str, float]:
    """Return the clean and the certified accuracy over the test images, in percent."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net, images, labels = pixel_net(run)
    found = certify(net.to(device), images.to(device), labels.to(device))
    named = {f"certified_{radius}": found.certified_accuracy(radius / 255) for radius in _RADII}
    return {"clean": found.clean_accuracy, **named}


def main(folder: Path) -> None:
    """Probe, train, certify, and write ``outcome.json``."""
    started = time.monotonic()
    plan = json.loads((folder / "plan.json").read_text())
    recipe = recipe_of(plan)
    one_epoch = seconds_per_epoch(recipe, folder / "probe")
    left = plan["seconds"] - (time.monotonic() - started)
    agreed = folder.parent / f"{plan['study']}-{plan['recipe']}.epochs"
    recipe = fitted(recipe, plan, one_epoch, left, agreed)
    print(f"{one_epoch:.2f} s an epoch: {recipe.epochs} epochs", flush=True)
    before = time.monotonic()
    run = train(recipe, folder / "run", progress=False)
    outcome: dict[str, Any] = {
        "wall_seconds": round(time.monotonic() - before, 1),
        "trained_epochs": recipe.epochs,
        "published_epochs": get_recipe(plan["recipe"]).epochs,
    }
    if plan["certified"] and not (run.result or {})["diverged"]:
        outcome |= {key: round(value, 4) for key, value in certificate(run).items()}
    (folder / "outcome.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
