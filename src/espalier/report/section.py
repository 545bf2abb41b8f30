"""What a page is made of: sections of markup, plots and pictures, and what their makers may know of the page."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

# Okabe and Ito's colours, in an order that keeps neighbours apart; readable on light and on dark, and by everyone.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31")


@dataclass(frozen=True)
class Markup:
    """HTML that is ready to stand on the page; whoever makes it has escaped what came from outside."""

    html: str


@dataclass(frozen=True)
class Plot:
    """A plotly figure and the sentence under it, in plain text: what to look at, and how many runs stand behind it."""

    figure: Any
    caption: str


@dataclass(frozen=True)
class Section:
    """One titled part of a page; the title is plain text."""

    title: str
    parts: tuple[Markup | Plot, ...]


@dataclass(frozen=True)
class Context:
    """What a section may know of its page: the folder that links start from, and one colour an arm."""

    folder: Path
    colours: Mapping[str, str]

    def link(self, path: Path, text: str = "") -> str:
        """Return a link to a file or folder, relative to the page and called so; plain text where nothing is there."""
        target = os.path.relpath(path.resolve(), self.folder.resolve())
        text = text or target
        if not path.exists():
            return escape(text)
        return f'<a href="{escape(quote(target))}">{escape(text)}</a>'


def arm_colours(arms: Sequence[str]) -> dict[str, str]:
    """Return one colour an arm, in order of first appearance; the seventh arm after another one shares its colour."""
    return {arm: _COLOURS[index % len(_COLOURS)] for index, arm in enumerate(dict.fromkeys(arms))}


def counted(number: int, noun: str) -> str:
    """Return ``1 run``, ``2 runs``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def paragraph(text: str, kind: str = "") -> Markup:
    """Return a paragraph of plain text."""
    return Markup(f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>")


def bullets(lines: Sequence[str], kind: str = "") -> Markup:
    """Return plain sentences as a list."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return Markup(f'<ul class="{kind}">{items}</ul>')


def folded(summary: str, part: Markup) -> Markup:
    """Return a part that opens at a click on its summary."""
    return Markup(f"<details><summary>{escape(summary)}</summary>{part.html}</details>")


def table(header: Sequence[str], rows: Sequence[Sequence[str | Markup]], kind: str = "") -> Markup:
    """Return a table; cells of text are escaped, cells of markup are not."""

    def row(cells: Sequence[str | Markup], tag: str) -> str:
        inner = (cell.html if isinstance(cell, Markup) else escape(cell) for cell in cells)
        return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in inner) + "</tr>"

    body = "".join(row(cells, "td") for cells in rows)
    head = f"<thead>{row(header, 'th')}</thead>" if header else ""
    return Markup(f'<div class="scroll"><table class="{kind}">{head}<tbody>{body}</tbody></table></div>')
