"""Figures over the runs of a study, and over one run: learning curves, scores over learning rates."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from espalier.errors import require
from espalier.report.section import Context, Plot, Section, arm_colours
from espalier.study.statistics import Interval
from espalier.study.summary import ArmSummary, RatePoint, Summary
from espalier.train import Run


def learning_curves(summary: Summary, context: Context) -> Section | None:
    """Draw the mean curve of every arm at its best rate, with its interval as a band."""
    arms = [arm for arm in summary.arms if arm.curve]
    if not arms:
        return None
    factor = 100 if summary.is_share else 1
    traces = [trace for arm in arms for trace in _band(arm, context.colours[arm.arm], factor)]
    behind = ", ".join(f"{arm.arm}: {max(point.score.n for point in arm.curve)} at lr {arm.best_lr:g}" for arm in arms)
    caption = (
        f"Mean {summary.metric} of every arm at its own best learning rate, with {100 * summary.level:g} % intervals "
        f"over seeds as bands. Look at how early the curves part, and whether their bands still overlap at the end. "
        f"Runs behind each curve: {behind}."
    )
    scores = [point.score for arm in arms for point in arm.curve]
    ends = [factor * end for s in scores for end in ((s.low, s.high) if s.defined else (s.mean,))]
    figure = figure_of(traces, summary.unit, _axis_name(summary))
    figure.update_yaxes(range=_axis_range(ends, share=summary.is_share))
    return Section("Learning curves", (Plot(figure, caption),))


def score_over_rate(summary: Summary, context: Context) -> Section | None:
    """Draw every score over its learning rate, the means as lines, and mark the window and the diverged runs."""
    arms = [arm for arm in summary.arms if any(point.scores or point.diverged for point in arm.rates)]
    if not arms:
        return None
    factor = 100 if summary.is_share else 1
    scores = [score for arm in arms for point in arm.rates for score in point.scores.values()]
    # Diverged runs have no score: they stand under all that have one.
    floor = factor * (min(scores) - 0.08 * _height(scores)) if scores else 0.0
    traces = [trace for arm in arms for trace in _rate_traces(arm, context.colours[arm.arm], factor, floor)]
    figure = figure_of(traces, "learning rate", _axis_name(summary))
    rates = sorted({point.lr for arm in arms for point in arm.rates})
    figure.update_xaxes(type="log", tickvals=rates, ticktext=[f"{rate:g}" for rate in rates])
    shown = f"{100 * summary.tolerance:g} points" if summary.is_share else f"{summary.tolerance:g}"
    count = len(scores) + sum(len(point.diverged) for arm in arms for point in arm.rates)
    caption = (
        f"Dots are single runs, {count} in all; lines join the means, the ring is an arm's best rate, and the thick "
        f"part of a line is its window (means within {shown} of the best). Crosses are diverged runs, which have no "
        "score. A wide window says that the rate need not be tuned; a best rate at the edge, that more should be tried."
    )
    return Section("Score over learning rate", (Plot(figure, caption),))


def run_curves(run: Run, context: Context) -> Section | None:
    """Draw what one run recorded: its training loss, and every measure of its evaluations."""
    recorded = dict.fromkeys(key for row in run.rows for key, value in row.items() if value is not None)
    losses = [name for name in recorded if "loss" in name]
    scores = [name for name in recorded if "/" in name and name not in losses]
    plots = []
    for group, axis in ((losses, "loss"), (scores, "score")):
        colours = arm_colours(group)
        if group:
            traces = [_record(run, name, colours[name]) for name in group]
            figure = figure_of(traces, "epoch", group[0] if len(group) == 1 else axis)
            plots.append(Plot(figure, f"{', '.join(group)} over the epochs of this one run."))
    return Section("Curves", tuple(plots)) if plots else None


def _band(arm: ArmSummary, colour: str, factor: float) -> list[Any]:
    name = escape(arm.arm)
    points = [point for point in arm.curve if point.score.defined]
    outline = [(point.epoch, factor * point.score.high) for point in points]
    outline += [(point.epoch, factor * point.score.low) for point in points[::-1]]
    words = [
        f"{name}<br>epoch {point.epoch:g}, step {point.step}<br>{_interval(point.score, factor)}<br>n = {point.score.n}"
        for point in arm.curve
    ]
    means = [(point.epoch, factor * point.score.mean) for point in arm.curve]
    band = scatter(outline, (), name, mode="lines", line={"width": 0}, fill="toself", fillcolor=_faint(colour))
    line = scatter(means, words, name, mode="lines+markers", showlegend=True, **_line(colour))
    return [band, line] if points else [line]


def _rate_traces(arm: ArmSummary, colour: str, factor: float, floor: float) -> list[Any]:
    name = escape(arm.arm)
    dots = [(point.lr, factor * score) for point in arm.rates for score in point.scores.values()]
    dot_words = [
        f"{name}, lr {point.lr:g}<br>{factor * score:.4g}<br>seed {seed}"
        for point in arm.rates
        for seed, score in point.scores.items()
    ]
    crosses = [(point.lr, floor) for point in arm.rates for _ in point.diverged]
    cross_words = [f"{name}, lr {p.lr:g}<br>seed {seed} diverged" for p in arm.rates for seed in p.diverged]
    scored, window = [p for p in arm.rates if p.scores], arm.window
    inside = [p for p in scored if window and window.low <= p.lr <= window.high]
    best = [p for p in scored if p.lr == arm.best_lr]

    def of_means(points: Sequence[RatePoint], **options: Any) -> Any:
        words = [f"{name}, lr {p.lr:g}<br>mean {factor * p.mean:.4g}<br>n = {len(p.scores)}" for p in points]
        return scatter([(p.lr, factor * p.mean) for p in points], words, name, **options)

    ring = {"size": 14, "symbol": "circle-open", "color": colour, "line": {"width": 2.5}}
    cross = {"size": 9, "symbol": "x-thin", "line": {"width": 2, "color": colour}}
    return [
        scatter(dots, dot_words, name, mode="markers", marker={"color": colour, "size": 7, "opacity": 0.55}),
        scatter(crosses, cross_words, name, mode="markers", marker=cross),
        of_means(scored, mode="lines", line={"color": colour, "width": 1.5}, showlegend=True),
        of_means(inside, mode="lines", line={"color": colour, "width": 5}),
        of_means(best, mode="markers", marker=ring),
    ]


def scatter(points: Sequence[tuple[float, float]], words: Sequence[str], name: str, **options: Any) -> Any:
    """Return plotly's trace of points, hidden from the legend, with words that are shown under the pointer."""
    graph = require("plotly.graph_objects", "train")
    options = {"showlegend": False, "hoverinfo": "text" if words else "skip", **options}
    x, y = [x for x, _ in points], [y for _, y in points]
    return graph.Scatter(x=x, y=y, hovertext=list(words), name=name, legendgroup=name, **options)


def _line(colour: str) -> dict[str, Any]:
    return {"line": {"color": colour, "width": 2.5}, "marker": {"color": colour, "size": 5}}


def _record(run: Run, name: str, colour: str) -> Any:
    points = [(row["epoch"], row[name]) for row in run.rows if row.get(name) is not None]
    words = [f"{escape(name)}<br>epoch {epoch:g}<br>{value:.4g}" for epoch, value in points]
    return scatter(points, words, escape(name), mode="lines+markers", showlegend=True, **_line(colour))


def figure_of(traces: Sequence[Any], across: str, up: str) -> Any:
    """Return a figure in the page's style with the names of its axes."""
    graph = require("plotly.graph_objects", "train")
    figure = graph.Figure(traces)
    # Colours of text and grid come from the page's style, so that they follow light and dark.
    figure.update_layout(
        template="none", height=360, margin={"l": 64, "r": 16, "t": 36, "b": 48}, hovermode="closest",
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", font={"size": 13},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}, showlegend=True,
    )  # fmt: skip
    axis = {"gridcolor": "rgba(128,128,128,0.22)", "zeroline": False, "linecolor": "rgba(128,128,128,0.6)"}
    figure.update_xaxes(title=escape(across), **axis)
    figure.update_yaxes(title=escape(up), automargin=True, **axis)
    return figure


def _axis_range(ends: Sequence[float], *, share: bool) -> list[float]:
    margin = 0.04 * _height(ends)
    low, high = min(ends) - margin, max(ends) + margin
    # No score lies outside 0 and 100 %, even where an interval of few runs does.
    return [max(low, -2.0), min(high, 102.0)] if share else [low, high]


def _height(values: Sequence[float]) -> float:
    # Equal values have none; what is small beside 1 must not look equal.
    return max(max(values) - min(values), 1e-3 * max(map(abs, values))) or 1.0


def _axis_name(summary: Summary) -> str:
    return f"{summary.metric}, %" if summary.is_share else summary.metric


def _interval(score: Interval, factor: float) -> str:
    if not score.defined:
        return f"{factor * score.mean:.4g}"
    return f"{factor * score.mean:.4g} [{factor * score.low:.4g}, {factor * score.high:.4g}]"


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.16)"
