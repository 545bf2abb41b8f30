"""Which arms a recipe's model has a place for: what ``espalier compare --arms all`` compares."""

from __future__ import annotations

from torch import Tensor

from espalier import data
from espalier.errors import EspalierError
from espalier.recipes import ARMS, Recipe, apply_arm
from espalier.train.build import build_run_model, freeze_


def applicable_arms(recipe: Recipe) -> list[str]:
    """Return every arm that applies to a recipe's model and differs from the arms before it, the default first.

    Each arm is tried on the model that a trial of it would train: one that finds nothing to write or to freeze is left
    out, and so is one that writes the very weights of an earlier arm (``structured`` on a model with one family).

    Raises:
        EspalierError: the recipe's data or model cannot be built.
    """
    source = data.build_source(recipe)
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
