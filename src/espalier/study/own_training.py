"""A training function of the user's own, in place of a recipe: what a plan knows of it, and what it returns."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from espalier.errors import EspalierError
from espalier.own_code import digest
from espalier.study.statistics import score_limits
from espalier.study.training_parts import training_parts

Scores = float | Sequence[tuple[int, float]]
TrainFunction = Callable[[str, float, int, Path], Scores]


@dataclass(frozen=True)
class OwnTraining:
    """What a study knows of a function that trains its trials."""

    name: str
    code: str
    """First digits of the SHA-256 of its parts."""
    metric: str = "score"
    """Name of the score; larger is better. One that ends in ``accuracy`` is a share of one."""
    lr: float = 1e-3
    """Centre of an ``"auto"`` grid of learning rates."""
    parts: dict[str, str] = field(default_factory=dict, compare=False)
    """By name, what ``training_parts`` finds: earlier versions noted none."""

    @classmethod
    def of(cls, train: TrainFunction, metric: str = "score", lr: float = 1e-3) -> OwnTraining:
        """Describe a function, a bound method, a callable object or a ``functools.partial`` of one.

        Raises:
            EspalierError: it cannot be called as ``train(arm, lr, seed, folder)``, or a bad ``lr``.
        """
        inner: Any = train
        while isinstance(inner, functools.partial):
            inner = inner.func
        inner = inspect.unwrap(inner)
        name = getattr(inner, "__qualname__", type(inner).__qualname__)
        try:
            inspect.signature(train).bind("arm", 1e-3, 0, Path())
        except (TypeError, ValueError) as error:
            raise EspalierError(f"train {name} must take (arm, lr, seed, folder): {error}") from error
        if not (isinstance(lr, int | float) and 0 < lr <= sys.float_info.max):
            raise EspalierError(f"lr {lr!r}: give a positive number, the centre of the grid of rates")
        if not (isinstance(metric, str) and metric and metric.isprintable()):
            raise EspalierError(f"metric {metric!r}: give its name")
        parts = training_parts(train)
        return cls(name, digest(json.dumps(parts, sort_keys=True).encode()), metric, lr, parts)

    def continues(self, there: OwnTraining, kept: bool) -> OwnTraining:
        """Return this training under the code of a study's trials, if it is the same or they are to be kept."""
        if kept or self.parts == there.parts:
            return replace(self, code=there.code)
        # Trials that were kept have the code of what it was before: should it be that again, it is still another.
        return replace(self, code="") if self.code == there.code else self

    def difference(self, now: OwnTraining) -> str:
        """Say in a few words what of the training has changed."""
        if not self.parts:
            return "it was planned by an earlier version, which noted less of the training"
        names = sorted({name for name, _ in self.parts.items() ^ now.parts.items()})
        return f"its training has changed in {', '.join(names[:5])}{', …' if len(names) > 5 else ''}"

    def digest(self, lr: float, seed: int) -> str:
        """Return 16 hexadecimal digits of what a trial is, as ``recipe_digest`` does for a recipe."""
        what = {"train": self.name, "code": self.code, "metric": self.metric, "trial_lr": lr, "seed": seed}
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def read_scores(returned: Any, metric: str) -> list[tuple[int, float]]:
    """Return what a training function returned as (step, score) pairs, the last the final one; one score has step 0.

    Raises:
        EspalierError: neither a score nor a curve, steps that do not increase, or a share outside [0, 1].
    """
    is_curve = isinstance(returned, Sequence) and not isinstance(returned, str | bytes)
    try:
        pairs = [(_number(step), _number(score)) for step, score in (returned if is_curve else [(0, returned)])]
        curve = [(int(step), score) for step, score in pairs]
        steps = [step for step, _ in curve]
        if not steps or steps != sorted({abs(step) for step in steps}) or any(step % 1 for step, _ in pairs):
            raise ValueError("steps must increase")
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise EspalierError(
            f"train returned {shortened(returned)} ({shortened(error)}): return a score, or a list of (step, score) "
            "with increasing whole steps"
        ) from error
    low, high = score_limits(metric)
    for _, score in curve:
        if math.isfinite(score) and not low <= score <= high:
            raise EspalierError(
                f"train returned {score:g} as {metric}: give shares of one, or another name of the metric"
            )
    return curve


def _number(value: Any) -> float:
    if isinstance(value, str | bytes | bool):
        raise TypeError(f"{type(value).__name__} is no number")
    return float(value)


def shortened(value: Any) -> str:
    """Return an object, or what an error says, as a few words of one line for a message."""
    try:
        text = str(value) if isinstance(value, Exception) else repr(value)
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        text = "a number of thousands of digits"
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}..."
