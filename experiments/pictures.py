"""Score over learning rate as a small SVG: every run a dot, means joined, diverged runs as crosses below."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from espalier.study import Summary

COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860")
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 640, 360, 60, 20, 46, 46


def score_over_rate(summary: Summary, title: str) -> str:
    """Return the picture of a study; arms beyond the sixth are left to the table."""
    arms = summary.arms[: len(COLOURS)]
    scores = [score for arm in arms for point in arm.rates for score in point.scores.values()]
    low, high = (0.0, 1.0) if summary.is_share else (min(scores), max(scores) or 1.0)
    logs = [math.log10(lr) for lr in summary.study.lrs]
    span = max(logs[-1] - logs[0], 1e-9)

    def place(lr: float, score: float) -> tuple[float, float]:
        across = (math.log10(lr) - logs[0]) / span if len(logs) > 1 else 0.5
        up = (score - low) / max(high - low, 1e-9)
        return (
            _LEFT + 12 + across * (_WIDTH - _LEFT - _RIGHT - 24),
            _HEIGHT - _BOTTOM - 8 - up * (_HEIGHT - _TOP - _BOTTOM - 16),
        )

    parts = [_axes(summary, title, low, high, place)]
    for index, arm in enumerate(arms):
        colour = COLOURS[index]
        line = [place(point.lr, point.mean) for point in arm.rates if point.scores]
        parts.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="2" '
            f'points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in line)}"/>'
        )
        for point in arm.rates:
            for score in point.scores.values():
                x, y = place(point.lr, score)
                parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}" fill-opacity="0.55"/>')
            for number in range(len(point.diverged)):
                x, y = place(point.lr, low)
                parts.append(_text(x + 7 * number, y + 7, "×", colour))
        parts.append(_text(_LEFT + 12 + 150 * (index % 4), 30 + 12 * (index // 4), f"● {arm.arm}", colour))
    inside = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        f'font-size="11">\n<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>\n{inside}\n</svg>\n'
    )


def _axes(
    summary: Summary, title: str, low: float, high: float, place: Callable[[float, float], tuple[float, float]]
) -> str:
    lines: list[str] = [_text(_LEFT, 16, title, "#222222")]
    lrs: Sequence[float] = summary.study.lrs
    for step in range(5):
        value = low + (high - low) * step / 4
        _, y = place(lrs[0], value)
        lines.append(f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}" stroke="#dddddd"/>')
        lines.append(_text(8, y + 4, f"{100 * value:.0f} %" if summary.is_share else f"{value:.3g}", "#555555"))
    for lr in lrs:
        x, _ = place(lr, low)
        lines.append(_text(x - 12, _HEIGHT - _BOTTOM + 16, f"{lr:g}", "#555555"))
    lines.append(
        _text(_LEFT, _HEIGHT - 10, f"learning rate; {summary.metric}, every run a dot, lines join means", "#555555")
    )
    return "\n".join(lines)


def _text(x: float, y: float, text: str, colour: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}">{escape(text)}</text>'
