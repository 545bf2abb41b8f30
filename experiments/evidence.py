"""From records to a verdict on a claim, by rules that are fixed here and the same for every claim."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean

from espalier.study import Record, Summary, summarise
from espalier.study.solving import measure_solving
from espalier.study.statistics import Interval, first_crossing, t_interval
from espalier.study.summary import ArmSummary
from espalier.study.table import p_text, share_text
from experiments.experiment import ROW_SEEDS, Experiment
from experiments.windows import DEFINITIONS, log_width_ratio, scores_of

SHOWN, NOT_SHOWN, CONTRADICTED, NOT_RUN = "shown", "not shown", "contradicted", "not run at this scale"

# Note [Verdicts]
# A claim says that a figure is above zero: a paired difference, or a saving. With fewer than ROW_SEEDS values there is
# no verdict but "not run at this scale". Otherwise the 95 % interval decides: above zero is "shown", below zero is
# "contradicted", and an interval that holds zero is "not shown". Nothing else is looked at.


@dataclass(frozen=True)
class Evidence:
    """What the records say of a claim."""

    verdict: str
    n: int
    text: str


@dataclass
class Results:
    """The records, and the summaries that are made of them."""

    records: Sequence[Record]
    _made: dict[str, Summary] = field(default_factory=dict)

    def summary(self, experiment: Experiment) -> Summary:
        """Return the summary of an experiment."""
        if experiment.name not in self._made:
            self._made[experiment.name] = summarise(experiment.study(Path("runs/queue"), self.records))
        return self._made[experiment.name]


Judge = Callable[[Results], Evidence]


def verdict(interval: Interval | None) -> str:
    """Return the verdict on the claim that a figure is above zero (Note [Verdicts])."""
    if interval is None or interval.n < ROW_SEEDS:
        return NOT_RUN
    if interval.low > 0:
        return SHOWN
    return CONTRADICTED if interval.high < 0 else NOT_SHOWN


def weakest_of(verdicts: Sequence[str]) -> str:
    """Return the verdict that stands where a claim needs several."""
    return min(verdicts, key=(NOT_RUN, CONTRADICTED, NOT_SHOWN, SHOWN).index)


def not_run(results: Results) -> Evidence:
    """Judge a claim for which there is no experiment yet."""
    return Evidence(NOT_RUN, 0, "–")


def better(experiment: Experiment, arm: str, baseline: str, where: str = "") -> Judge:
    """Judge that an arm beats another, each at its own best rate, over paired seeds; where, in words for the table."""
    return partial(_better, experiment=experiment, arm=arm, baseline=baseline, where=where)


def weakest(judges: Sequence[Judge]) -> Judge:
    """Judge a claim that needs several: the weakest of the verdicts stands."""
    return partial(_weakest, judges=judges)


def across(experiments: Sequence[Experiment], arm: str, baseline: str) -> Judge:
    """Judge that an arm beats another over many settings: the mean difference of each setting is one value."""
    return partial(_across, experiments=experiments, arm=arm, baseline=baseline)


def extra_better(experiment: Experiment, arm: str, baseline: str, metrics: Sequence[str]) -> Judge:
    """Judge that an arm beats another by other figures, at the rates that the score chose."""
    return partial(_extra_better, experiment=experiment, arm=arm, baseline=baseline, metrics=metrics)


def sooner(experiment: Experiment, arm: str, baseline: str) -> Judge:
    """Judge that an arm reaches the baseline's final score in fewer epochs, seed by seed."""
    return partial(_sooner, experiment=experiment, arm=arm, baseline=baseline)


def wider_window(experiment: Experiment, arm: str, baseline: str) -> Judge:
    """Judge that an arm's window of learning rates is wider, by two definitions: the weaker of the verdicts stands."""
    return partial(_wider_window, experiment=experiment, arm=arm, baseline=baseline)


def reaches(study: str, arm: str, goal: float, metric: str = "") -> Judge:
    """Judge that the runs of a study outside the queue (experiments/gpu.py) reach a published score."""
    return partial(_reaches, study=study, arm=arm, goal=goal, metric=metric)


def _better(results: Results, experiment: Experiment, arm: str, baseline: str, where: str) -> Evidence:
    summary = results.summary(experiment)
    difference = summary.difference(arm, baseline)
    if difference is None:
        return Evidence(NOT_RUN, 0, "–")
    factor = 100 if summary.is_share else 1
    place = f", {where}" if where else ""
    text = f"{arm} over {baseline}{place}: {interval_text(difference.t, factor)}"
    found = {row.arm: row for row in measure_solving(summary)} if summary.is_share else {}
    if found and any(row.solved.solved for row in found.values()):
        text += f"; solve it: {share_text(found[baseline].solved)} and {share_text(found[arm].solved)}"
        p = found[arm].p
        text += "" if p is None else f", p = {p_text(p)}".replace("= <", "<")
    return Evidence(verdict(difference.t), difference.t.n, text)


def _weakest(results: Results, judges: Sequence[Judge]) -> Evidence:
    found = [judge(results) for judge in judges]
    text = "; ".join(each.text for each in found if each.text != "–") or "–"
    return Evidence(weakest_of([each.verdict for each in found]), min(each.n for each in found), text)


def _across(results: Results, experiments: Sequence[Experiment], arm: str, baseline: str) -> Evidence:
    differences = [results.summary(experiment).difference(arm, baseline) for experiment in experiments]
    whole = [found for found in differences if found is not None and found.t.n >= ROW_SEEDS]
    if len(whole) < ROW_SEEDS:
        return Evidence(NOT_RUN, len(whole), "–")
    interval = t_interval([found.t.mean for found in whole], limits=(-1.0, 1.0))
    won = sum(found.t.low > 0 for found in whole)
    lost = sum(found.t.high < 0 for found in whole)
    text = (
        f"mean over {len(whole)} of {len(experiments)} settings {interval_text(interval, 100)}; alone, {won} are above "
        f"zero and {lost} below"
    )
    return Evidence(verdict(interval), len(whole), text)


def _extra_better(
    results: Results, experiment: Experiment, arm: str, baseline: str, metrics: Sequence[str]
) -> Evidence:
    summary = results.summary(experiment)
    rates = {each.arm: each.best_lr for each in summary.arms}
    parts, verdicts, count = [], [], 0
    for metric in metrics:
        values = [_extra(summary, name, rates[name], metric) for name in (arm, baseline)]
        gaps = [values[0][seed] - values[1][seed] for seed in sorted(values[0].keys() & values[1].keys())]
        interval = t_interval(gaps, limits=(-1.0, 1.0)) if gaps else None
        verdicts.append(verdict(interval))
        if interval is not None:
            count = interval.n
            means = " and ".join(f"{100 * fmean(found.values()):.1f}" for found in reversed(values))
            parts.append(f"{metric.partition('/')[0]}: {means} %, {interval_text(interval, 100)}")
    return Evidence(weakest_of(verdicts), count, "; ".join(parts) or "–")


def _extra(summary: Summary, arm: str, lr: float | None, metric: str) -> Mapping[int, float]:
    found = [record for record in summary.records.values() if record.arm == arm and record.lr == lr]
    return {record.seed: record.extra[metric] for record in found if metric in record.extra}


def _wider_window(results: Results, experiment: Experiment, arm: str, baseline: str) -> Evidence:
    summary = results.summary(experiment)
    mine, theirs = scores_of(summary, arm), scores_of(summary, baseline)
    parts, verdicts, count = [], [], 0
    for words, width in DEFINITIONS.items():
        interval = log_width_ratio(mine, theirs, width)
        verdicts.append(verdict(interval))
        if interval is not None and interval.defined:
            count = interval.n
            mean, low, high = (10**value for value in (interval.mean, interval.low, interval.high))
            parts.append(f"{words}: × {mean:.2g} [{low:.2g}, {high:.2g}]")
    return Evidence(weakest_of(verdicts), count, "; ".join(parts) or "–")


def _reaches(results: Results, study: str, arm: str, goal: float, metric: str) -> Evidence:
    found = [record for record in results.records if (record.study, record.arm) == (study, arm)]
    scores = [score for record in found if (score := record.extra.get(metric) if metric else record.score) is not None]
    if not scores:
        return Evidence(NOT_RUN, 0, "–")
    interval = t_interval([score - goal for score in scores], limits=(-1.0, 1.0))
    epochs = sorted({record.epochs for record in found})
    text = f"{100 * fmean(scores):.1f} % against {100 * goal:.1f} %, after {' or '.join(map(str, epochs))} epochs"
    return Evidence(verdict(interval), len(scores), text)


def _sooner(results: Results, experiment: Experiment, arm: str, baseline: str) -> Evidence:
    summary = results.summary(experiment)
    arms = {each.arm: each for each in summary.arms}
    goals = _final(arms[baseline])
    savings = []
    for record in summary.records.values():
        if record.arm == arm and record.lr == arms[arm].best_lr and record.seed in goals and not record.diverged:
            epochs, scores = [row[0] for row in record.curve], [row[3] for row in record.curve]
            reached = first_crossing(epochs, scores, goals[record.seed])
            # A run that never gets there has saved nothing, at best.
            savings.append(1 - reached / record.epochs if reached == reached else 0.0)
    if not savings:
        return Evidence(NOT_RUN, 0, "–")
    interval = t_interval(savings, limits=(-1.0, 1.0))
    text = f"share of the epochs saved: {interval_text(interval, 100)} %"
    return Evidence(verdict(interval), interval.n, text)


def _final(arm: ArmSummary) -> Mapping[int, float]:
    return next((point.scores for point in arm.rates if point.lr == arm.best_lr), {})


def interval_text(interval: Interval, factor: float = 1) -> str:
    """Return ``+3.0 [+1.2, +4.8]``."""
    mean, low, high = (
        f"{factor * value:+.1f}".replace("-", "−") for value in (interval.mean, interval.low, interval.high)
    )
    return f"{mean} [{low}, {high}]" if interval.defined else f"{mean} (n = 1)"
