"""A summary in words and as tables: the same cells as plain text, Markdown and HTML."""

from __future__ import annotations

import math
from collections.abc import Sequence

from espalier.study.solving import THRESHOLD, Share, Solving, measure_solving
from espalier.study.statistics import Interval, difference_of, score_limits, t_interval
from espalier.study.summary import ArmSummary, Summary
from espalier.study.trial import Trial
from espalier.tables import plain_table

NOTES = (
    "A run solves the task if its score reaches the threshold; a diverged run does not. Shares come with exact "
    "(Clopper–Pearson) intervals, over all rates and seeds together and at each rate.",
    "p, paired permutation: of the difference between the shares of rates that each seed solves, exact over all "
    "choices of signs; p at one rate: Fisher's exact test. Neither is adjusted for the number of rates or arms.",
    "Area over log rate: the mean score over the logarithm of the rates that were tried, for each seed, a diverged "
    "run counted as 0: one figure for how forgiving a start is.",
)
"""What the tables of ``solving_tables`` rest on."""


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
    """Return what may be said of every arm against the baseline: a difference only where the interval excludes zero."""
    return [_sentence(arm, summary) for arm in summary.arms[1:]]


def _sentence(arm: ArmSummary, summary: Summary) -> str:
    base = summary.arms[0].arm
    if arm.difference is None:
        for each in (arm, summary.arms[0]):
            if each.diverged == each.planned:
                return f"{arm.arm} against {base}: nothing to compare, all runs of {each.arm} diverged"
        return f"{arm.arm} against {base}: no paired runs to compare yet"
    t, points = arm.difference.t, summary.is_share
    size = number(t.mean, points, sign=True) + (" points" if points else "")
    if not t.defined:
        return f"{arm.arm} against {base}: {size} on one paired seed, no difference shown (n = 1 has no interval)"
    span = f"{_span(t, points, sign=True)}, {t.n} paired seeds"
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
    low, high = score_limits(summary.metric)
    rows = []
    for index, lr in enumerate(summary.study.lrs):
        row = [f"{lr:g}"]
        for arm in summary.arms:
            point, beside = arm.rates[index], base.rates[index].scores
            values = list(point.scores.values())
            text = interval_text(t_interval(values, summary.level, (low, high)) if values else None, percent)
            gaps = [difference_of(score, beside[seed]) for seed, score in point.scores.items() if seed in beside]
            if arm is not base and gaps:
                gap = t_interval(gaps, summary.level, (low - high, high - low))
                text += f" ({interval_text(gap, percent, sign=True)})"
            row.append(text + (f", {len(point.diverged)} diverged" if point.diverged else ""))
        rows.append(tuple(row))
    return rows


def solving_tables(summary: Summary) -> list[list[tuple[str, ...]]]:
    """Return who solves the task over all rates and, where there is more than one, by rate, each with its header.

    Nothing is returned where no run of any arm reaches the threshold, or scores are not shares of one.
    """
    found = measure_solving(summary) if summary.is_share else []
    if not any(row.solved.solved for row in found):
        return []
    header = ("arm", "runs that solve it", "p, paired permutation", "area over log rate", "difference of areas")
    total = [header, *(_solving_row(row) for row in found)]
    if len(summary.study.lrs) == 1:
        return [total]
    by_rate = [("lr", *(row.arm for row in found))]
    for index, lr in enumerate(summary.study.lrs):
        by_rate.append((f"{lr:g}", *(_rate_cell(row, index) for row in found)))
    return [total, by_rate]


def share_text(share: Share) -> str:
    """Return ``7 of 12 (58 % [28, 85])``."""
    if not share.runs:
        return "–"
    return f"{share.solved} of {share.runs} ({100 * share.value:.0f} % [{100 * share.low:.0f}, {100 * share.high:.0f}])"


def p_text(p: float) -> str:
    """Return a p value with two digits, and the smallest ones as a bound."""
    return "–" if math.isnan(p) else f"{p:.2g}" if p >= 0.001 else "< 0.001"


def interval_text(interval: Interval | None, percent: bool, *, sign: bool = False) -> str:
    """Return ``mean [low, high]``; ``n = 1`` where there is no interval, a dash where there is nothing."""
    if interval is None:
        return "–"
    mean = number(interval.mean, percent, sign=sign)
    return f"{mean} {_span(interval, percent, sign=sign)}" if interval.defined else f"{mean} (n = 1)"


def number(value: float, percent: bool, *, sign: bool = False) -> str:
    """Return a score as text: in percent with one decimal, or with three digits."""
    # Adding zero turns −0.0 into 0.0.
    text = f"{round(100 * value, 1) + 0.0:+.1f}" if percent else f"{value + 0.0:+.3g}"
    # A minus sign as wide as the plus, and no plus on plain scores.
    return (text if sign else text.removeprefix("+")).replace("-", "−")


def _span(interval: Interval, percent: bool, *, sign: bool) -> str:
    return f"[{number(interval.low, percent, sign=sign)}, {number(interval.high, percent, sign=sign)}]"


def _row(arm: ArmSummary, summary: Summary) -> tuple[str, ...]:
    percent = summary.is_share
    gap, bootstrap = (arm.difference.t, arm.difference.bootstrap) if arm.difference else (None, None)
    reached = f"{arm.epochs_to_baseline:.3g} of {arm.epochs}"
    if math.isnan(arm.epochs_to_baseline):
        reached = "not reached" if arm.curve else "–"
    return (
        arm.arm,
        "–" if arm.best_lr is None else f"{arm.best_lr:g}",
        _window(arm),
        interval_text(arm.score, percent),
        "baseline" if arm is summary.arms[0] else interval_text(gap, percent, sign=True),
        _span(bootstrap, percent, sign=True) if bootstrap and bootstrap.defined else "–",
        reached,
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


def _solving_row(row: Solving) -> tuple[str, ...]:
    p = difference = "baseline"
    if row.p is not None:
        p = p_text(row.p)
        difference = interval_text(row.area_difference.t if row.area_difference else None, True, sign=True)
    return row.arm, share_text(row.solved), p, interval_text(row.area, True), difference


def _rate_cell(row: Solving, index: int) -> str:
    p = "" if row.p_by_rate is None else f", p = {p_text(row.p_by_rate[index])}"
    return share_text(row.by_rate[index]) + p.replace("= <", "<")


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
