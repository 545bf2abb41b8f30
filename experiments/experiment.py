"""What an experiment is: one question, the trials that answer it, and how many seeds it gets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from espalier.recipes import Recipe
from espalier.recipes.validation import resolve_recipe
from espalier.study import Record, Study, summarise
from espalier.study.trial import arm_changes
from espalier.train import Run

# Note [Seeds]
# Every experiment says how many seeds it gets. When all trials of those are finished, the queue looks at each pair of
# arms once: a pair whose 95 % interval touches zero gets more seeds, at every rate, up to ten. The decision rests on
# the first seeds alone and is not taken again while seeds are added, so nothing stops because it looks good; the page
# reports the n that this rule gives. A pair that is decided at the first look stays at its first n. Seeds are added in
# their order, BATCH at a time for all studies in turn, so that a queue that is cut short leaves no study far behind.
# Where more seeds cost days, or many settings stand for one row, the number is fixed (`extend`), and the page says so.
MOST_SEEDS = 10
BATCH = 2
ROW_SEEDS = 3
"""Seeds after which a row of the table has an interval worth printing: they come before more seeds of other rows."""


@dataclass(frozen=True)
class Experiment:
    """One question and the trials that answer it; the first arm is the baseline."""

    name: str
    """Name of its study and of its file of records."""
    title: str
    recipe: Recipe
    arms: Sequence[str] | Mapping[str, Mapping[str, Any]]
    lrs: tuple[float, ...]
    seeds: int
    """Seeds that are planned, from 0; Note [Seeds] may add more."""
    minutes: float
    """What a trial takes on one core, about."""
    pairs: tuple[tuple[str, str], ...] = ()
    """(arm, baseline) whose difference is asked for; every arm against the first if none is given."""
    extend: bool = True
    """Whether Note [Seeds] applies."""
    measure: Callable[[Run], Mapping[str, float]] | None = field(default=None, repr=False)
    """Figures of the final model to keep in the record; the accuracies of the other splits if none is given."""
    metric: str = ""
    """The extra figure that is compared, and that chooses the rates, in place of the records' own score."""

    def study(self, out: Path, records: Iterable[Record] = ()) -> Study:
        """Return the study with as many seeds of every arm as the records ask for (Note [Seeds]); writes nothing.

        Args:
            out: the folder of the queue.
            records: of any studies.
        """
        mine = [record for record in records if record.study == self.name]
        return self._planned(out, mine, self._seeds_by_arm(out, mine))

    def row(self, out: Path, records: Iterable[Record] = ()) -> Study:
        """Return the study with no more seeds than a row of the table needs."""
        return self._planned(out, records, dict.fromkeys(self.arms, min(self.seeds, ROW_SEEDS)))

    def first(self, out: Path, records: Iterable[Record] = ()) -> Study:
        """Return the study with the seeds that were planned from the start."""
        return self._planned(out, records, dict.fromkeys(self.arms, self.seeds))

    def asked_pairs(self) -> tuple[tuple[str, str], ...]:
        """Return the pairs of arms whose difference is asked for."""
        names = list(self.arms)
        return self.pairs or tuple((arm, names[0]) for arm in names[1:])

    def _seeds_by_arm(self, out: Path, records: Sequence[Record]) -> dict[str, int]:
        counts = dict.fromkeys(self.arms, self.seeds)
        if not self.extend or self.seeds < 2 or not records:
            return counts
        first = self.first(out, records)
        unfinished = {trial.arm for trial in first.trials() if not trial.finished}
        if unfinished & {arm for pair in self.asked_pairs() for arm in pair}:
            return counts
        summary = summarise(first)
        for pair in self.asked_pairs():
            difference = summary.difference(*pair)
            if difference is not None and not difference.shown:
                counts |= dict.fromkeys(pair, max(self.seeds, MOST_SEEDS))
        return counts

    def _planned(self, out: Path, records: Iterable[Record], counts: Mapping[str, int]) -> Study:
        recipe = resolve_recipe(self.recipe)
        seeds = tuple(range(max(counts.values())))
        fewer = {arm: seeds[:count] for arm, count in counts.items() if count < len(seeds)}
        plan = Study(out / "trials" / self.name, recipe, arm_changes(recipe, self.arms), self.lrs, seeds, fewer)
        return plan.with_records(scored_by(record, self.metric) for record in records if record.study == self.name)


def scored_by(record: Record, metric: str) -> Record:
    """Return a record whose score is one of its extra figures; one that has no such figure has no score."""
    if not metric or metric == record.metric:
        return record
    score = record.extra.get(metric)
    return replace(record, metric=metric, score=score, curve=())
