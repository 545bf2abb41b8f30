"""Networks to take pictures of: the states of runs, with labels, and how their pictures are laid out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from espalier.errors import EspalierError
from espalier.init.layouts import find_layers
from espalier.report.raster import Panel, Row
from espalier.report.section import Section
from espalier.train import Run

# What is shown of a large network where several stand side by side, so that a page stays small.
LAYERS, HEADS = 4, 4

W = TypeVar("W")


@dataclass(frozen=True)
class View:
    """A network at one moment, with the run that it belongs to, if any."""

    net: nn.Module
    name: str = ""
    """The arm; empty for a single run or network."""
    moment: str = ""
    """``start`` or ``end``."""
    run: Run | None = None

    @property
    def label(self) -> str:
        """What stands before its row of pictures."""
        return ", ".join(part for part in (self.name, self.moment) if part)


PictureMaker = Callable[[Sequence[View]], Section | None]
"""Draws one kind of picture of every network that it applies to, one row a network; None where there is none."""


def views_of(runs: Mapping[str, Run]) -> tuple[list[View], list[str]]:
    """Return every run's network at the start and at the end, and in words which of them cannot be shown.

    Args:
        runs: by arm; the name of a single run is empty.
    """
    views, problems = [], []
    for name, run in runs.items():
        for which, moment in (("start", "start"), ("final", "end")):
            try:
                views.append(View(run.model(which), name, moment, run))  # type: ignore[arg-type]
            except (EspalierError, OSError) as error:
                problems.append(f"{name} at the {moment}: {error}".removeprefix(" "))
    return views, problems


def layers_of(view: View, kind: type[W]) -> list[tuple[str, W]]:
    """Return the layers of one kind (``AttentionWeights``, ``DepthwiseWeights``) by name, in module order."""
    return [(name or "(model)", found) for name, _, found in find_layers(view.net) if isinstance(found, kind)]


def lay_out(
    found: Sequence[tuple[View, Sequence[tuple[str, W]]]], draw: Callable[[str, W], Sequence[Panel]]
) -> tuple[list[str], list[Row]]:
    """Return column headings and rows of panels: a row a network, or a row a layer where there is one network only.

    Args:
        found: every network with its layers, as ``layers_of`` gives them.
        draw: name and weights of a layer to its panels.
    """
    if len(found) == 1:
        return [""], [Row(name, [draw(name, weights)]) for name, weights in found[0][1]]
    shown = spread(len(found[0][1]), LAYERS)
    # A network with fewer layers than the first has gaps.
    rows = [
        Row(view.label, [draw(*layers[index]) if index < len(layers) else () for index in shown])
        for view, layers in found
    ]
    return [found[0][1][index][0] for index in shown], rows


def spread(count: int, shown: int) -> list[int]:
    """Return up to ``shown`` indices below ``count``, evenly spread, the first and the last among them."""
    if count <= shown:
        return list(range(count))
    return [round(index * (count - 1) / (shown - 1)) for index in range(shown)]


def left_out(count: int, shown: int, things: str) -> str:
    """Return the sentence that says what is not shown, e.g. ``Shown are 4 of 12 layers, evenly spread.``"""
    return f" Shown are {shown} of {count} {things}, evenly spread." if count > shown else ""


def runs_behind(views: Sequence[View]) -> str:
    """Return the sentence that says which runs the pictures are of; nothing for a network without a run."""
    runs = {view.name: view.run.recipe for view in views if view.run is not None}
    if not runs:
        return ""
    if not any(runs):
        return " One run."
    return " One run an arm: " + ", ".join(f"{name} lr={r.lr:g} seed={r.seed}" for name, r in runs.items()) + "."
