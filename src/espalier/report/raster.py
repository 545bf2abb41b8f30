"""Matrices as small pictures: block means, mosaics, two colour scales, PNG as a data address."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from espalier.errors import require
from espalier.report.section import Markup

Scale = Literal["diverging", "sequential"]

# Plotly's names: blue below zero, red above; from dark to light.
_SCALES: dict[Scale, str] = {"diverging": "RdBu_r", "sequential": "Viridis"}


@dataclass(frozen=True)
class Panel:
    """One picture: a matrix, and the words that stand for it where it cannot be seen."""

    values: Tensor
    words: str


@dataclass(frozen=True)
class Row:
    """A labelled row of a picture table: for every column a few panels side by side."""

    label: str
    cells: Sequence[Sequence[Panel]]


def shrink(values_HW: Tensor, side: int) -> Tensor:
    """Return a matrix of at most ``side`` × ``side`` means over equal blocks; a smaller one comes back as it is."""
    height, width = (min(size, side) for size in values_HW.shape)
    if (height, width) == tuple(values_HW.shape):
        return values_HW
    return F.adaptive_avg_pool2d(values_HW[None], (height, width))[0]


def mosaic(tiles_NHW: Tensor, columns: int) -> Tensor:
    """Return tiles laid out row by row with one pixel of NaN between them."""
    count, height, width = tiles_NHW.shape
    rows = -(-count // columns)
    canvas = tiles_NHW.new_full((rows * columns, height + 1, width + 1), torch.nan)
    canvas[:count, :height, :width] = tiles_NHW
    grid = canvas.reshape(rows, columns, height + 1, width + 1).transpose(1, 2)
    return grid.reshape(rows * (height + 1), columns * (width + 1))[:-1, :-1]


def png_address(values_HW: Tensor, low: float, high: float, scale: Scale) -> str:
    """Return a picture of a matrix as a ``data:`` address: one pixel an entry, NaN transparent.

    Args:
        values_HW: the matrix.
        low: value of the first colour; anything below has it too.
        high: value of the last colour.
        scale: the colours.
    """
    image_module = require("PIL.Image", "train")
    values = values_HW.detach().double().cpu().numpy()
    share = np.clip((values - low) / max(high - low, np.finfo(float).tiny), 0, 1)
    # Entry 0 of the palette is the transparent one.
    indices = np.where(np.isnan(values), 0, 1 + np.round(254 * np.nan_to_num(share))).astype(np.uint8)
    image = image_module.fromarray(indices)
    image.putpalette([0, 0, 0, *(round(255 * part) for colour in _colours(scale, 255) for part in colour)])
    return _address(image, transparency=0)


def picture_table(
    title: str, columns: Sequence[str], rows: Sequence[Row], *, scale: Scale, shared: bool, caption: str
) -> Markup:
    """Return rows of panels as a table with a title, a colour scale and a caption.

    Args:
        title: plain text over the table; empty where the section's title says it.
        columns: a heading for every cell of a row.
        rows: the panels.
        scale: ``diverging`` around zero, or ``sequential`` from zero.
        shared: one range of values for all panels (they can be compared), else every panel has its own.
        caption: plain text under the table.
    """
    limit = value_limit([panel.values for row in rows for cell in row.cells for panel in cell]) if shared else None
    widest = max(sum(len(cell) for cell in row.cells) for row in rows)
    side = max(36, min(140, 900 // max(widest, 1) - 6))
    body = []
    for row in rows:
        cells = "".join(f"<td>{_cell(cell, limit, scale, side)}</td>" for cell in row.cells)
        body.append(f"<tr><th>{escape(row.label)}</th>{cells}</tr>")
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    table = f'<table class="pictures"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'
    heading = f"<h4>{escape(title)}</h4>" if title else ""
    return Markup(
        f'<figure>{heading}<div class="scroll">{table}</div><div class="scale">{_scale_words(limit, scale)}</div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def photograph(image_CHW: Tensor, caption: str) -> Markup:
    """Return an image of one or three channels with a caption; its values are stretched to the range of a screen."""
    pixels_CHW = image_CHW.detach().double().cpu()
    pixels_CHW = pixels_CHW if len(pixels_CHW) == 3 else pixels_CHW[:1].expand(3, -1, -1)
    low, high = pixels_CHW.min(), pixels_CHW.max()
    pixels_CHW = 255 * (pixels_CHW - low) / (high - low).clamp_min(torch.finfo(torch.float64).tiny)
    picture = require("PIL.Image", "train").fromarray(pixels_CHW.permute(1, 2, 0).round().byte().numpy())
    _, height, width = pixels_CHW.shape
    image = f'<img src="{_address(picture)}" alt="{escape(caption)}" style="width:96px;aspect-ratio:{width}/{height}">'
    return Markup(f'<figure class="photograph">{image}<figcaption>{escape(caption)}</figcaption></figure>')


def value_limit(matrices: Sequence[Tensor]) -> float:
    """Return what 99.5 % of the entries stay under in size, so that a single outlier does not bleach the rest."""
    sizes = np.concatenate([matrix.detach().abs().double().flatten().cpu().numpy() for matrix in matrices])
    sizes = sizes[np.isfinite(sizes)]
    return float(np.quantile(sizes, 0.995)) if len(sizes) else 0.0


def _cell(panels: Sequence[Panel], limit: float | None, scale: Scale, side: int) -> str:
    images = []
    for panel in panels:
        top = value_limit([panel.values]) if limit is None else limit
        address = png_address(panel.values, -top if scale == "diverging" else 0.0, top, scale)
        height, width = panel.values.shape
        size = f"width:{side}px;aspect-ratio:{width}/{height}"
        images.append(f'<img src="{address}" alt="{escape(panel.words)}" title="{escape(panel.words)}" style="{size}">')
    return f'<div class="panels">{"".join(images)}</div>' if images else "–"


def _scale_words(limit: float | None, scale: Scale) -> str:
    stops = ",".join(f"rgb({','.join(f'{255 * part:.0f}' for part in colour)})" for colour in _colours(scale, 9))
    low, high = ("−", "+") if limit is None else (f"−{limit:.2g}", f"+{limit:.2g}")
    if scale == "sequential":
        low, high = "0", "largest" if limit is None else f"{limit:.2g}"
    own = " each panel on its own scale" if limit is None else ""
    return f'<span>{low}</span><i style="background:linear-gradient(90deg,{stops})"></i><span>{high}{own}</span>'


def _address(image: Any, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True, **options)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@cache
def _colours(scale: Scale, count: int) -> list[tuple[float, float, float]]:
    colours = require("plotly.colors", "train")
    return colours.sample_colorscale(_SCALES[scale], np.linspace(0, 1, count), colortype="tuple")
