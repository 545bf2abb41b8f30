"""What a finished trial leaves behind: one line of JSON, small enough to commit, enough to rebuild every table."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import PurePath
from typing import Any

from espalier.errors import EspalierError
from espalier.lookup import with_texts, without_file_pin
from espalier.recipes import Recipe
from espalier.recipes.validation import FILE_FIELDS, MACHINE_FIELDS, from_values, recipe_to_dict, refuse_repeated
from espalier.study.own_training import OwnTraining, shortened
from espalier.study.statistics import is_share, score_limits, spread
from espalier.train import Run, environment
from espalier.train.manifest import read_manifest
from espalier.train.run import CONTENTS, ENVIRONMENT, RESULT, is_number, read_part

MAX_BYTES = 1500
"""Largest line, newline included."""
SCORE_DIGITS = 6
"""Decimals that a record keeps of a score: finer than one example in 100,000."""
TOLERANCE = 2e-6
"""Two scores of one trial that are further apart than rounding on two machines contradict each other: by this much, or,
if they may be of any size, by this share of the larger."""
_CURVE_DIGITS, _MOST_POINTS = 4, 24
_CHECK = ',"check":"'
"""Before the last thing on a line: a digest of the line without it, which the oldest records do not have."""
_PACKAGES = ("espalier", "torch", "transformers")

CurveRow = tuple[float, int, float, float]
"""Epoch, step, seconds of training, score."""


@dataclass(frozen=True)
class Record:
    """One finished trial. A diverged one has no score; ``extra`` holds a few more figures of the final model."""

    study: str
    arm: str
    lr: float
    seed: int
    digest: str
    """Of the trial's resolved recipe (``recipe_digest``)."""
    metric: str
    score: float | None
    diverged: bool
    epochs: int
    steps: int
    seconds: float
    """Training time, evaluation excluded."""
    step_seconds: float | None
    """Median step."""
    curve: tuple[CurveRow, ...]
    """Evaluations, thinned to a couple of dozen; the first and the last are always there."""
    extra: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    commit: str = ""
    processor: str = ""
    date: str = ""
    """Day on which the trial ended, UTC."""
    data: str = ""
    """Digest of what the data hold, wherever they lie; empty where nothing says it, as in the oldest records."""

    @property
    def key(self) -> tuple[str, str, str]:
        """What makes two records one trial: study, arm and digest."""
        return self.study, self.arm, self.digest

    def line(self) -> str:
        """Return the record as one line of JSON of at most ``MAX_BYTES``; a long curve is thinned until it fits.

        Raises:
            EspalierError: it does not fit without any curve.
        """
        record = self
        while len(text := record._json()) + 1 > MAX_BYTES:
            if len(record.curve) <= 2:
                raise EspalierError(
                    f"record of {self.arm} lr={self.lr:g} seed={self.seed} in {self.study} takes {len(text)} bytes, "
                    f"{MAX_BYTES} are allowed: keep fewer figures in extra"
                )
            record = replace(record, curve=_thinned(record.curve, len(record.curve) - 1))
        return text + "\n"

    def _json(self) -> str:
        # ASCII, so that bytes and characters are the same number and no editor's encoding matters.
        values = {name.name: getattr(self, name.name) for name in fields(self)}
        if not self.data:  # a line that does not say it stays the line that it was
            del values["data"]
        text = json.dumps(values, allow_nan=False, separators=(",", ":"))
        return f'{text[:-1]}{_CHECK}{_check(text)}"}}'


def recipe_digest(recipe: Recipe) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of what a trial is: its recipe without ``MACHINE_FIELDS``.

    Fields at their default do not count, so that a field that a later version adds changes no digest. A file that an
    argument of the model or the initialisation names counts by its content, any other by its name without its folder.
    """
    default = recipe_to_dict(Recipe(name=""))
    values = {
        name: _without_folders(value)
        for name, value in recipe_to_dict(recipe).items()
        if name not in MACHINE_FIELDS and value != default[name]
    }
    values |= {name: with_texts(values[name], _content) for name in FILE_FIELDS if name in values}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def known_digests(recipe: Recipe) -> tuple[str, ...]:
    """Return the digest of a recipe, and the one that earlier versions gave it where it names files.

    They looked at the name alone: what those records were made with is unknown, and they stay records of the trial.
    """
    unpinned = {name: with_texts(getattr(recipe, name), without_file_pin) for name in FILE_FIELDS}
    earlier = replace(recipe, **unpinned)
    return (recipe_digest(recipe), *([] if earlier == recipe else [recipe_digest(earlier)]))


def record_run(run: Run, study: str, arm: str, extra: Mapping[str, float] | None = None) -> Record:
    """Return the record of a finished run.

    Args:
        run: the run folder, read back.
        study: name of its study.
        arm: its arm.
        extra: figures of the final model to keep beside the score; by default the accuracies of the other splits.

    Raises:
        EspalierError: the run is not finished, a figure is not finite, or no run can have such numbers.
    """
    result = run.result
    if result is None:
        raise EspalierError(f"run {run.path} is not finished: it leaves no record yet")
    metric = str(result["metric"])
    rows = [row for row in run.rows if row.get(metric) is not None]
    curve = [(row["epoch"], row["step"], round(row["seconds"], 1), round(row[metric], _CURVE_DIGITS)) for row in rows]
    if extra is None:
        last = run.rows[-1] if run.rows and not result["diverged"] else {}
        extra = {k: v for k, v in last.items() if k.endswith("/accuracy") and k != metric and v is not None}
    if not all(math.isfinite(value) for value in extra.values()):
        raise EspalierError(f"run {run.path}: extra figures {dict(extra)} are not finite: leave them out")
    path = run.path / ENVIRONMENT
    step = result.get("step_seconds")
    record = Record(
        study=study,
        arm=arm,
        lr=run.recipe.lr,
        seed=run.recipe.seed,
        digest=recipe_digest(run.recipe),
        metric=metric,
        score=None if result["score"] is None else round(result["score"], SCORE_DIGITS),
        diverged=bool(result["diverged"]),
        epochs=int(result["epochs"]),
        steps=int(result["steps"]),
        seconds=round(result["seconds"], 1),
        step_seconds=float(f"{step:.4g}") if step else None,
        curve=_thinned(curve, _MOST_POINTS),
        extra={key: round(value, SCORE_DIGITS) for key, value in extra.items()},
        date=datetime.fromtimestamp((run.path / RESULT).stat().st_mtime, UTC).date().isoformat(),
        data=read_manifest(run.path)[1].get(CONTENTS, ""),
        **_origin(read_part(run.path, ENVIRONMENT) if path.exists() else {}),
    )
    try:  # what could not be read again would keep the whole file of records from being read
        record_from_line(record.line())
    except ValueError as error:
        raise EspalierError(f"run {run.path} leaves no record ({error}): train into another folder") from None
    return record


def record_scores(
    training: OwnTraining, arm: str, lr: float, seed: int, curve: Sequence[tuple[int, float]], seconds: float
) -> Record:
    """Return the record of a trial of the user's own training; its study is the folder that it is found in.

    Steps stand where a run has epochs. A last score that is not finite means that the trial diverged.

    Args:
        training: the function.
        arm: the trial's arm.
        lr: its learning rate.
        seed: its seed.
        curve: (step, score), the last the final one; a single one is no curve.
        seconds: what it took.
    """
    step, score = curve[-1]
    # The final score is kept whole, as arms may differ in its last digits; on the way there seven do, of any size.
    rounded = [*((at, float(f"{value:.7g}")) for at, value in curve[:-1]), curve[-1]]
    finite = [(float(at), at, 0.0, value) for at, value in rounded if math.isfinite(value)]
    return Record(
        study=training.name,
        arm=arm,
        lr=lr,
        seed=seed,
        digest=training.digest(lr, seed),
        metric=training.metric,
        score=score if math.isfinite(score) else None,
        diverged=not math.isfinite(score),
        epochs=step,
        steps=step,
        seconds=round(seconds, 1),
        step_seconds=None,
        curve=_thinned(finite, _MOST_POINTS) if len(curve) > 1 else (),
        date=datetime.now(UTC).date().isoformat(),
        **_origin(environment()),
    )


def record_from_line(line: str) -> Record:
    """Read one line back.

    Raises:
        ValueError: it is no record; the message says what is wrong with it.
    """
    text, found, check = line.rstrip().rpartition(_CHECK)
    if found:
        line = f"{text}}}"
        if check != f'{_check(line)}"}}':
            raise ValueError("damaged: its digest is not the one it states")
    try:
        values = json.loads(line, parse_constant=_refuse_constant, object_pairs_hook=refuse_repeated)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError("not an object of fields")
    record = from_values(Record, {"seconds": 0.0, "step_seconds": None, **values}, "record")
    for name, holds in _RULES.items():
        if not holds(value := getattr(record, name)):
            raise ValueError(f"field {name!r} is {shortened(value)}")
    _refuse_impossible(record)
    if record.diverged != (record.score is None):
        raise ValueError(f"diverged is {record.diverged} and score is {record.score}")
    return record


def _check(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def contradiction(records: Sequence[Record]) -> str | None:
    """Return in what the records of one trial contradict each other beyond rounding, None where they agree."""
    if len(data := {record.data for record in records} - {""}) > 1:
        return f"data {' and '.join(sorted(data))}"
    if len({record.diverged for record in records}) > 1:
        return "diverged and not"
    figures: dict[str, list[float]] = {}
    for record in records:
        for name, value in {"score": record.score, **record.extra}.items():
            if value is not None:
                figures.setdefault(name, []).append(value)
    shares = all(is_share(record.metric) for record in records)
    for name, values in figures.items():
        # A score of the user's own, or what it was summed up from, may be of any size; every other figure is a share.
        size = max(map(abs, values)) if name == "score" and not shares else 1.0
        if max(values) - min(values) > TOLERANCE * size:
            return f"{name} {' and '.join(f'{value:.7g}' for value in sorted(set(values)))}"
    return None


def _origin(where: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that say what a trial ran on."""
    found = {**packages, **where} if isinstance(packages := where.get("packages"), dict) else where
    return {
        "versions": {name: str(found[name]) for name in (*_PACKAGES, "python") if name in found},
        "commit": str(where.get("git_commit") or ""),
        "processor": str(where.get("gpu") or where.get("processor") or ""),
    }


def _thinned(rows: Sequence[CurveRow], most: int) -> tuple[CurveRow, ...]:
    return tuple(rows[index] for index in spread(len(rows), most))


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    return PurePath(value).name if isinstance(value, str) and PurePath(value).is_absolute() else value


def _content(text: str) -> str:
    return text.removeprefix(without_file_pin(text)) or text


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a finite number")


def _refuse_impossible(record: Record) -> None:
    """Refuse scores that the metrics of a record cannot have; which are shares, their names say."""
    figures = [("score", record.metric, record.score)]
    figures += [("a score of its curve", record.metric, row[3]) for row in record.curve]
    figures += [(name, name, value) for name, value in record.extra.items()]
    for what, name, value in figures:
        low, high = score_limits(name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"{what} is {value:g}, and {shortened(name)} lies in [{low:g}, {high:g}]")
    steps = [row[1] for row in record.curve]
    if steps != sorted(set(steps)):
        raise ValueError("the steps of its curve do not increase")


# What must hold of fields beyond their types.
_RULES: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("study", "arm", "digest", "metric"), bool),
    **dict.fromkeys(("seed", "epochs", "steps", "seconds"), lambda value: value >= 0),
    "lr": lambda value: value > 0,
    "step_seconds": lambda value: value is None or value > 0,
    "curve": lambda rows: all(all(map(is_number, row)) and min(row[:3]) >= 0 for row in rows),
    "extra": lambda figures: all(map(is_number, figures.values())),
    "data": lambda digest: not digest or re.fullmatch("[0-9a-f]{16}", digest) is not None,
}
