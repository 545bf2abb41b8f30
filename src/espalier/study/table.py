"""A summary in words and as a table: the same cells as plain text, Markdown and HTML."""

from __future__ import annotations

import math
from collections.abc import Sequence

from espalier.study.solving import THRESHOLD
from espalier.study.solving_table import NOTES, solving_tables
from espalier.study.statistics import Interval, difference_of, score_limits, t_interval
from espalier.study.summary import ArmSummary, Summary
from espalier.study.trial import Trial
from espalier.tables import plain_table


def header(summary: Summary) -> tuple[str, ...]:
    """Return what stands above the columns of ``cells``."""
    first = ("arm", "best lr", "lr window", "score", "difference to baseline", "bootstrap")
    return (*first, f"{summary.unit}s to baseline", "time per step", "runs")


def cells(summary: Summary) -> list[tuple[str, ...]]:
    """Return one row of text an arm, in the order of ``header``."""
    return [_row(arm, summary) for arm in summary.arms]


def failure_lines(summary: Summary) -> list[str]:
    """Return one line for every error that ended trials, with their number and the first of them."""
    alike: dict[str, list[Trial]] = {}
    for trial, text in summary.failures:
        alike.setdefault(text.strip().partition("\n")[0], []).append(trial)
    return [
        f"failed: {trials[0]}: {text}"
        if len(trials) == 1
        else f"{len(trials)} trials failed, {trials[0]} first: {text}"
        for text, trials in alike.items()
    ]


def sentences(summary: Summary) -> list[str]:
    """Return what may be said of every arm against the baseline, one sentence each."""
    return [sentence(arm, summary) for arm in summary.arms[1:]]


def sentence(arm: ArmSummary, summary: Summary) -> str:
    """Return what may be said of one arm: a difference only where the interval excludes zero."""
    base = summary.arms[0].arm
    if arm.difference is None:
        return f"{arm.arm} against {base}: no paired runs to compare yet"
    t, points = arm.difference.t, summary.is_share
    size = number(t.mean, points, sign=True) + (" points" if points else "")
    if not t.defined:
        return f"{arm.arm} against {base}: {size} on one paired seed, no difference shown (n = 1 has no interval)"
    low, high = (number(value, points, sign=True) for value in (t.low, t.high))
    span = f"[{low}, {high}], {t.n} paired seeds"
    if not arm.difference.shown:
        return f"{arm.arm} against {base}: no difference shown, {size} {span}"
    return f"{arm.arm} is {size} {'over' if t.mean > 0 else 'under'} {base}, {span}"


def counts(arm: ArmSummary) -> str:
    """Return how many runs stand behind an arm's numbers, and what became of the others."""
    missing = arm.planned - arm.finished - arm.failed
    parts = [f"{arm.finished} of {arm.planned}" if arm.finished != arm.planned else str(arm.planned)]
    parts += [f"{count} {word}" for count, word in ((arm.diverged, "diverged"), (arm.failed, "failed")) if count]
    return ", ".join(parts + ([f"{missing} unfinished"] if missing else []))


def assumptions(summary: Summary) -> list[str]:
    """Return what the numbers rest on, in a few sentences."""
    points = summary.is_share
    tolerance = f"{100 * summary.tolerance:g} points" if points else f"{summary.tolerance:g}"
    base = summary.arms[0].arm
    return [
        f"Score: {summary.metric}{' in %' if points else ''} after the last {summary.unit}, mean over seeds at each "
        f"arm's own best learning rate; brackets hold {100 * summary.level:g} % intervals.",
        "Differences are paired by seed (same base weights, same batches) and judged by Student's t interval, which "
        "assumes independent seeds with normal scatter and is not adjusted for the number of arms; the percentile "
        "bootstrap stands beside it and is too narrow for few seeds. An interval that covers zero shows no difference."
        + (" No interval leaves 0 to 100 %: the mean cannot." if points else ""),
        "The best learning rate is chosen on the scores that are reported, for every arm alike, so scores are "
        "slightly optimistic. A rate at which any seed diverged cannot be the best.",
        f"The window is the ratio of the largest to the smallest rate, without a gap around the best, whose mean "
        f"score is within {tolerance} of the best; ≥ says that it reaches the edge of the rates that were tried.",
        f"{summary.unit.capitalize()}s to baseline: where the arm's mean curve, linear between evaluations, first "
        f"reaches the final mean score of {base}. Time per step: median over runs, which may have shared the machine.",
    ]


def text_table(summary: Summary) -> str:
    """Return the summary as plain text for a terminal."""
    table = plain_table([header(summary), *cells(summary)])
    return "\n".join([table, "", *sentences(summary), *failure_lines(summary)])


def markdown_table(summary: Summary) -> str:
    """Return the summary as Markdown for a page of results: what was found, and what it rests on."""
    notes = [f"- {text}" for text in (*assumptions(summary), *(NOTES if solving_tables(summary) else ()))]
    return "\n".join([*markdown_findings(summary), "", "What the numbers rest on:", "", *notes, ""])


def markdown_findings(summary: Summary) -> list[str]:
    """Return the lines of the summary's tables and sentences, without what they rest on."""
    lines = markdown_rows([header(summary), *cells(summary)])
    lines += ["", *(f"- {_escaped(text)}" for text in (*sentences(summary), *failure_lines(summary)))]
    if len(summary.study.lrs) > 1:
        arms = ("lr", *(arm.arm for arm in summary.arms))
        lines += ["", "Score by learning rate, with the difference to the baseline at the same rate:", ""]
        lines += markdown_rows([arms, *rate_rows(summary)])
    for rows, words in zip(solving_tables(summary), ("over all rates and seeds", "by learning rate"), strict=False):
        lines += ["", f"Runs that reach {100 * THRESHOLD:g} %, {words}:", "", *markdown_rows(rows)]
    return lines


def markdown_rows(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of text, the first the header, as the lines of a Markdown table."""
    lines = ["| " + " | ".join(map(_escaped, row)) + " |" for row in rows]
    return [lines[0], "| " + " | ".join(["---"] * len(rows[0])) + " |", *lines[1:]]


def rate_rows(summary: Summary) -> list[tuple[str, ...]]:
    """Return one row of text a learning rate: every arm's mean score, and how far it is from the baseline there."""
    percent, base = summary.is_share, summary.arms[0]
    rows = []
    for index, lr in enumerate(summary.study.lrs):
        row = [f"{lr:g}"]
        for arm in summary.arms:
            point, beside = arm.rates[index], base.rates[index].scores
            values = list(point.scores.values())
            limits = score_limits(summary.metric)
            text = mean_and_interval(t_interval(values, summary.level, limits) if values else None, percent=percent)
            gaps = [difference_of(score, beside[seed]) for seed, score in point.scores.items() if seed in beside]
            if arm is not base and gaps:
                text += f" ({_bracketed(t_interval(gaps, summary.level, _gap_limits(summary)), percent)})"
            row.append(text + (f", {len(point.diverged)} diverged" if point.diverged else ""))
        rows.append(tuple(row))
    return rows


def mean_and_interval(interval: Interval | None, *, percent: bool) -> str:
    """Return ``mean [low, high]``; ``n = 1`` where there is no interval, a dash where there is nothing."""
    if interval is None:
        return "–"
    mean = number(interval.mean, percent)
    if not interval.defined:
        return f"{mean} (n = 1)"
    return f"{mean} [{number(interval.low, percent)}, {number(interval.high, percent)}]"


def _row(arm: ArmSummary, summary: Summary) -> tuple[str, ...]:
    percent, difference = summary.is_share, arm.difference
    return (
        arm.arm,
        "–" if arm.best_lr is None else f"{arm.best_lr:g}",
        _window(arm),
        mean_and_interval(arm.score, percent=percent),
        "baseline" if arm is summary.arms[0] else _bracketed(difference.t if difference else None, percent),
        _bracketed(difference.bootstrap if difference else None, percent, mean=False),
        "–"
        if not arm.curve
        else "not reached"
        if math.isnan(arm.epochs_to_baseline)
        else f"{arm.epochs_to_baseline:.3g} of {arm.epochs}",
        "–" if math.isnan(arm.step_seconds) else f"{1e3 * arm.step_seconds:.3g} ms (× {arm.step_ratio:.2f})",
        counts(arm),
    )


def _window(arm: ArmSummary) -> str:
    if arm.window is None:
        return "–"
    if len(arm.rates) == 1:
        return "one rate"
    edge = "≥ " if arm.window.open_low or arm.window.open_high else ""
    return f"{edge}× {arm.window.ratio:.3g}"


def _bracketed(interval: Interval | None, percent: bool, *, mean: bool = True) -> str:
    if interval is None:
        return "–"
    centre = number(interval.mean, percent, sign=True)
    if not interval.defined:
        return f"{centre} (n = 1)" if mean else "–"
    span = f"[{number(interval.low, percent, sign=True)}, {number(interval.high, percent, sign=True)}]"
    return f"{centre} {span}" if mean else span


def number(value: float, percent: bool, *, sign: bool = False) -> str:
    """Return a score as text: in percent with one decimal, or with three digits."""
    # Adding zero turns −0.0 into 0.0.
    text = f"{round(100 * value, 1) + 0.0:+.1f}" if percent else f"{value + 0.0:+.3g}"
    # A minus sign as wide as the plus, and no plus on plain scores.
    return (text if sign else text.removeprefix("+")).replace("-", "−")


def _gap_limits(summary: Summary) -> tuple[float, float]:
    low, high = score_limits(summary.metric)
    return low - high, high - low


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
