"""A training function of the user's own, in place of a recipe: what a plan knows of it, and what it returns."""

from __future__ import annotations

import dis
import functools
import hashlib
import inspect
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

from espalier.errors import EspalierError
from espalier.study.statistics import score_limits

Scores = float | Sequence[tuple[int, float]]
TrainFunction = Callable[[str, float, int, Path], Scores]


@dataclass(frozen=True)
class OwnTraining:
    """What a study knows of a function that trains its trials."""

    name: str
    code: str
    """First digits of the SHA-256 of the function's source (else its name), of the plain values bound to it, and of the
    plain values of its module that it names."""
    metric: str = "score"
    """Name of the score; larger is better. One that ends in ``accuracy`` is a share of one."""
    lr: float = 1e-3
    """Centre of an ``"auto"`` grid of learning rates."""

    @classmethod
    def of(cls, train: TrainFunction, metric: str = "score", lr: float = 1e-3) -> OwnTraining:
        """Describe a function, a bound method, a callable object or a ``functools.partial`` of one.

        Raises:
            EspalierError: it cannot be called as ``train(arm, lr, seed, folder)``, or a bad ``lr``.
        """
        inner, bound = train, []
        while isinstance(inner, functools.partial):
            bound.append(_bound_values(inner))
            inner = inner.func
        inner = inspect.unwrap(inner)
        bound.append(_bound_values(inner))
        name = getattr(inner, "__qualname__", type(inner).__qualname__)
        try:
            inspect.signature(train).bind("arm", 1e-3, 0, Path())
        except (TypeError, ValueError) as error:
            raise EspalierError(f"train {name} must take (arm, lr, seed, folder): {error}") from error
        if not (isinstance(lr, int | float) and 0 < lr <= sys.float_info.max):
            raise EspalierError(f"lr {lr!r}: give a positive number, the centre of the grid of rates")
        if not (isinstance(metric, str) and metric and metric.isprintable()):
            raise EspalierError(f"metric {metric!r}: give its name")
        try:
            source = inspect.getsource(inner if hasattr(inner, "__qualname__") else type(inner))
        except (OSError, TypeError):  # typed at a prompt, or compiled
            source = name
        # A function that names no constant keeps the digest that studies of earlier versions have.
        constants = _named_constants(inner)
        text = f"{source}{bound}{constants or ''}"
        code = hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:12]
        return cls(name, code, metric, lr)

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


def _bound_values(function: Any) -> list[tuple[str, Any]]:
    """Return the plain values that a callable carries besides its source: another value is another training.

    Other objects are left out: nothing says whether two of them, in two processes, are equal.
    """
    if isinstance(function, functools.partial):
        values: dict[str, Any] = {"": function.args, **function.keywords}
    else:
        function_code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None) or ()
        values = {n: c.cell_contents for n, c in zip(getattr(function_code, "co_freevars", ()), cells, strict=False)}
        owner = getattr(function, "__self__", None if hasattr(function, "__qualname__") else function)
        values |= getattr(owner, "__dict__", {})
    return _plain_values(values)


def _named_constants(function: Any) -> list[tuple[str, Any]]:
    """Return the plain values of its module that a function, or a method of a callable object, names.

    A name that its own code assigns to is a counter or a cache, and no constant.
    """
    if not hasattr(function, "__qualname__"):  # an object: every method of its class may train
        methods = [method for kind in type(function).__mro__ for method in vars(kind).values()]
    else:
        methods = [getattr(function, "__func__", function)]
    found: dict[str, Any] = {}
    for method in methods:
        code, names = getattr(method, "__code__", None), getattr(method, "__globals__", {})
        read, written = _global_names(code) if code is not None else (set(), set())
        found |= {name: names[name] for name in read - written if name in names and not name.startswith("__")}
    return _plain_values(found)


def _global_names(code: CodeType) -> tuple[set[str], set[str]]:
    """Return the names of the module that code reads and those that it assigns to, in functions inside it, too."""
    steps = list(dis.get_instructions(code))
    read = {step.argval for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    written = {step.argval for step in steps if step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL")}
    for inner in (_global_names(each) for each in code.co_consts if isinstance(each, CodeType)):
        read, written = read | inner[0], written | inner[1]
    return read, written


def _plain_values(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    plain = str | int | float | bool | None
    return [
        (name, value)
        for name, value in sorted(values.items())
        if isinstance(value, plain) or (isinstance(value, tuple) and all(isinstance(item, plain) for item in value))
    ]


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
