"""Trials of a study are compared only where they saw the same data, wherever each of them ran."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from espalier.data.source import Source, data_digest
from espalier.errors import EspalierError
from espalier.recipes import Recipe
from espalier.study.record import Record
from espalier.train.manifest import MANIFEST, read_manifest
from espalier.train.run import check_data


class Begun(Protocol):
    """What is asked of a trial here."""

    @property
    def recipe(self) -> Any:
        """A ``Recipe``, or what stands for a training of the user's own."""

    @property
    def path(self) -> Path:
        """Folder of the trial's run, whether or not it is there."""

    @property
    def record(self) -> Record | None:
        """The record that was merged from elsewhere, if any."""


def data_key(recipe: Recipe) -> str:
    """Return a text that is the same for recipes of the same data, as their digest sees them."""
    return repr((recipe.dataset, recipe.data_path, sorted(recipe.data_args.items()), recipe.normalize))


def refuse_two_data(where: Path, outcomes: Iterable[tuple[Begun, Record]]) -> None:
    """Refuse records of data that differ where the recipes of their trials name the same; those that say none pass.

    Args:
        where: the study's folder, for the message.
        outcomes: trials with what they left behind.

    Raises:
        EspalierError: the first two of them.
    """
    seen: dict[str, tuple[Begun, str]] = {}
    for trial, record in outcomes:
        if isinstance(trial.recipe, Recipe) and record.data:
            first, data = seen.setdefault(data_key(trial.recipe), (trial, record.data))
            if data != record.data:
                raise EspalierError(
                    f"{where} holds trials on different data, {first} ({data}) and {trial} ({record.data}), which "
                    "cannot be compared: delete the line, or the run folder, of each that is not to stand"
                )


def refuse_other_data(trials: Iterable[Begun], here: Mapping[str, Source], where: Path) -> None:
    """Hold trials that have begun, and records of such that are elsewhere, to the data that are here.

    Args:
        trials: of a study.
        here: the data by their recipes' ``data_key``.
        where: the study's records lie, for the message.

    Raises:
        EspalierError: a trial on other data.
    """
    digests: dict[str, str] = {}
    seen: set[tuple[str, Any]] = set()
    for trial in trials:
        if not isinstance(trial.recipe, Recipe) or (key := data_key(trial.recipe)) not in here:
            continue
        if (trial.path / MANIFEST).exists():
            data = read_manifest(trial.path)[1].get("data")
            if (key, data) not in seen:  # a digest takes a pass over all images
                seen.add((key, data))
                check_data(trial.path, here[key])
        if trial.record is None or not trial.record.data:
            continue
        if key not in digests:
            digests[key] = data_digest(here[key])
        if digests[key] and digests[key] != trial.record.data:
            raise EspalierError(
                f"{where}: the record of {trial} is of other data ({trial.record.data}) than those that "
                f"are here ({digests[key]}): give those that it was trained on, or choose another folder"
            )
