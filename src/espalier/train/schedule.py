"""The learning rate of every step, as a closed form of the step's number."""

from __future__ import annotations

import math

from espalier.recipes.base import Recipe


def piecewise(position: float) -> float:
    """Return the papers' piecewise-linear factor: 0 → 1 at 2/5 → 1/20 at 4/5 → 0 at 1 (arXiv 2201.09792, its script).

    Args:
        position: fraction of training, in [0, 1].
    """
    if position < 0.4:
        return position / 0.4
    if position < 0.8:
        return 1.0 + (position - 0.4) / 0.4 * (0.05 - 1.0)
    return 0.05 * (1.0 - position) / 0.2


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of optimiser step ``step``, with W warm-up steps out of T.

    ``cosine``: lr·(t+1)/W while t < W, then lr·½(1 + cos(π(t−W)/(T−W))): the first step after the warm-up has the
    full rate. ``piecewise``: the papers' line at (t+1)/T, as in the original script, so that no step but the last has
    rate zero. ``constant``: lr after the warm-up.

    Args:
        recipe: gives ``lr``, ``schedule``, ``warmup_epochs`` and ``epochs``.
        step: 0-based number t of the optimiser step within the whole run.
        steps_per_epoch: optimiser steps per epoch.
    """
    total = recipe.epochs * steps_per_epoch
    if recipe.schedule == "piecewise":
        return recipe.lr * piecewise((step + 1) / total)
    warmup = round(recipe.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    if recipe.schedule == "constant":
        return recipe.lr
    position = (step - warmup) / max(1, total - warmup)
    return recipe.lr * (0.5 * (1.0 + math.cos(math.pi * position)))
