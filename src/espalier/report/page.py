"""One self-contained page: sections in, a file out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import count
from pathlib import Path
from typing import Any

from torch import nn

from espalier.contents import without_numbers
from espalier.errors import EspalierError, require
from espalier.files import write_bytes
from espalier.report.filters import depthwise_filters
from espalier.report.mixing import attention_maps, mixing_matrices
from espalier.report.products import attention_products, state_space_products
from espalier.report.run_sections import RUN_SECTIONS
from espalier.report.section import Context, Markup, Plot, Section, arm_colours, bullets
from espalier.report.study_sections import STUDY_SECTIONS, first_runs, trials
from espalier.report.style import STYLE
from espalier.report.views import View, views_of
from espalier.study import Summary, summarise
from espalier.study.trial import STUDY, TRIALS
from espalier.train import Run, load_run
from espalier.train.run import RECIPE

PICTURES = (attention_maps, attention_products, mixing_matrices, state_space_products, depthwise_filters)
"""In the order of the page; a new kind of layer adds its own."""


@dataclass(frozen=True)
class Chapter:
    """What a page says of one folder."""

    title: str
    subtitle: str
    sections: Sequence[Section]


def write_report(folders: Sequence[Path], out: Path) -> Path:
    """Write one page over studies and runs: it works without a network, and links to run folders relative to itself.

    Args:
        folders: study folders and run folders, in the order of the page.
        out: the HTML file; its folder is made where it is missing.

    Returns:
        ``out``.

    Raises:
        EspalierError: no folder, or one that is neither a study nor a run.
    """
    out = Path(out)
    if not folders:
        raise EspalierError("folders is empty: name at least one study folder or run folder")
    found = [_open(Path(folder)) for folder in folders]
    arms = [arm for item in found if isinstance(item, Summary) for arm in item.study.arms]
    context = Context(out.parent, arm_colours(arms))
    return _write(out, "Espalier report", [_chapter(item, context) for item in found])


def write_weight_pictures(net: nn.Module, out: Path) -> Path:
    """Write a page with pictures of a network's structured layers as they are now.

    Attention shows ``W_Q W_Kᵀ`` a head and ``W_V W_proj`` a layer; state-space layers show ``W_Cᵀ W_B`` and how they
    mix a repeated sequence; depthwise convolutions show their filters, the covariance of their taps and its leading
    eigenvectors.

    Args:
        net: any module whose layers a layout knows.
        out: the HTML file; its folder is made where it is missing.

    Returns:
        ``out``.

    Raises:
        EspalierError: the network has no such layer, or its weights have no values (meta or fake tensors).
    """
    name = type(net).__name__
    if any(map(without_numbers, net.parameters())):
        raise EspalierError(f"model {name} has no numbers (meta or fake tensors): give its weights values, then draw")
    sections = _made(PICTURES, [View(net)])
    if not sections:
        raise EspalierError(f"model {name} has no layer to draw: register a layout for its classes")
    return _write(Path(out), f"Weights of {name}", [Chapter("", "", sections)])


def _open(folder: Path) -> Summary | Run:
    if (folder / STUDY).is_file():
        return summarise(folder)
    if (folder / RECIPE).is_file():
        return load_run(folder)
    raise EspalierError(f"folder {folder} is neither a study ({STUDY}) nor a run ({RECIPE}): name another one")


def _chapter(item: Summary | Run, context: Context) -> Chapter:
    if isinstance(item, Summary):
        sections = [*_made(STUDY_SECTIONS, item, context), *_pictures(first_runs(item)), trials(item, context)]
        return Chapter(f"Study {item.study.name}", " against ".join(item.study.arms), sections)
    sections = [*_made(RUN_SECTIONS, item, context), *_pictures({"": item})]
    return Chapter(f"Run {_short(item.path.resolve())}", "", sections)


def _made(makers: Iterable[Callable[..., Section | None]], *given: object) -> list[Section]:
    return [section for make in makers if (section := make(*given)) is not None]


def _pictures(runs: Mapping[str, Run]) -> list[Section]:
    """Return the pictures of runs, by arm, at their start and at their end, and a note on what cannot be shown."""
    views, problems = views_of(runs)
    note = [Section("Weights that cannot be shown", (bullets(problems, "note"),))] if problems else []
    return _made(PICTURES, views) + note


def _short(path: Path) -> str:
    # A trial's own folder is called after its seed alone.
    parts = path.parts
    return "/".join(parts[parts.index(TRIALS) + 1 :]) if TRIALS in parts else path.name


def _write(out: Path, title: str, chapters: Sequence[Chapter]) -> Path:
    content = _html(title, chapters).encode()
    out.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(out, content)
    return out


def _html(title: str, chapters: Sequence[Chapter]) -> str:
    plots = any(isinstance(part, Plot) for c in chapters for section in c.sections for part in section.parts)
    library = f"<script>{require('plotly.offline', 'train').get_plotlyjs()}</script>" if plots else ""
    numbers = count(1)
    body = "".join(_chapter_html(index, chapter, numbers) for index, chapter in enumerate(chapters))
    entries = "".join(f'<li><a href="#c{i}">{escape(chapter.title)}</a></li>' for i, chapter in enumerate(chapters))
    contents = f"<nav><ul>{entries}</ul></nav>" if len(chapters) > 1 else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" '
        f'content="light dark"><title>{escape(title)}</title><style>{STYLE}</style>{library}</head>\n'
        f"<body><main><h1>{escape(title)}</h1>{contents}{body}</main></body></html>\n"
    )


def _chapter_html(index: int, chapter: Chapter, numbers: Any) -> str:
    heading = f"<h2>{escape(chapter.title)}</h2>" if chapter.title else ""
    subtitle = f'<p class="subtitle">{escape(chapter.subtitle)}</p>' if chapter.subtitle else ""
    sections = "".join(
        f"<section><h3>{escape(section.title)}</h3>{''.join(_part_html(part, numbers) for part in section.parts)}"
        "</section>\n"
        for section in chapter.sections
    )
    return f'<article id="c{index}">{heading}{subtitle}{sections}</article>\n'


def _part_html(part: Markup | Plot, numbers: Any) -> str:
    if isinstance(part, Markup):
        return part.html
    # Plotly escapes what could end the script element.
    plot = part.figure.to_html(
        full_html=False, include_plotlyjs=False, div_id=f"plot-{next(numbers)}",
        config={"displaylogo": False, "responsive": True, "displayModeBar": False},
    )  # fmt: skip
    return f'<figure class="plot">{plot}<figcaption>{escape(part.caption)}</figcaption></figure>'
