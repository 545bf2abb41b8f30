"""The shares of runs that solve a task, as tables."""

from __future__ import annotations

import math

from espalier.study.solving import THRESHOLD, Share, Solving, measure_solving
from espalier.study.statistics import Interval, PairedDifference
from espalier.study.summary import Summary

HEADER = ("arm", "runs that solve it", "p, paired permutation", "area over log rate", "difference of areas")

NOTES = (
    "A run solves the task if its score reaches the threshold; a diverged run does not. Shares come with exact "
    "(Clopper–Pearson) intervals, over all rates and seeds together and at each rate.",
    "p, paired permutation: of the difference between the shares of rates that each seed solves, exact over all "
    "choices of signs; p at one rate: Fisher's exact test. Neither is adjusted for the number of rates or arms.",
    "Area over log rate: the mean score over the logarithm of the rates that were tried, for each seed, a diverged "
    "run counted as 0: one figure for how forgiving a start is.",
)


def solving_tables(summary: Summary, threshold: float = THRESHOLD) -> list[list[tuple[str, ...]]]:
    """Return the table over all rates and, where there is more than one, the table by rate, each with its header.

    Nothing is returned where no run of any arm reaches the threshold, or scores are not shares of one.
    """
    found = measure_solving(summary, threshold) if summary.is_share else []
    if not any(row.solved.solved for row in found):
        return []
    total = [HEADER, *(_total_row(row) for row in found)]
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


def _total_row(row: Solving) -> tuple[str, ...]:
    return (
        row.arm,
        share_text(row.solved),
        "baseline" if row.p is None else p_text(row.p),
        "–" if row.area is None else _interval(row.area),
        "baseline" if row.p is None else _difference(row.area_difference),
    )


def _rate_cell(row: Solving, index: int) -> str:
    p = "" if row.p_by_rate is None else f", p = {p_text(row.p_by_rate[index])}"
    return share_text(row.by_rate[index]) + p.replace("= <", "<")


def _interval(interval: Interval, *, sign: bool = False) -> str:
    low, mean, high = (
        f"{100 * value:{'+' if sign else ''}.1f}".replace("-", "−")
        for value in (interval.low, interval.mean, interval.high)
    )
    return f"{mean} [{low}, {high}]" if interval.defined else f"{mean} (n = 1)"


def _difference(difference: PairedDifference | None) -> str:
    return "–" if difference is None else _interval(difference.t, sign=True)
