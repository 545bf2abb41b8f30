"""Networks to take pictures of: the states of runs, with labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from espalier.errors import EspalierError
from espalier.init.layouts import find_layers
from espalier.report.section import Section
from espalier.train import Run

W = TypeVar("W")

# What one section shows of a large network, so that a page stays small; ``left_out`` says so in its caption.
LAYERS, HEADS = 4, 4


@dataclass(frozen=True)
class View:
    """A network at one moment: the label of its row of pictures, and the run it belongs to, if any."""

    label: str
    net: nn.Module
    run: Run | None = None


PictureMaker = Callable[[Sequence[View]], Section | None]
"""Draws one kind of picture of every network that it applies to, one row a network; None where there is none."""


def views_of(runs: Mapping[str, Run]) -> tuple[list[View], list[str]]:
    """Return every run's network at the start and at the end, and in words which of them cannot be shown.

    Args:
        runs: by label; the label of a single run may be empty.
    """
    views, problems = [], []
    for label, run in runs.items():
        for which, moment in (("start", "start"), ("final", "end")):
            name = f"{label}, {moment}" if label else moment
            try:
                views.append(View(name, run.model(which), run))  # type: ignore[arg-type]
            except (EspalierError, OSError) as error:
                problems.append(f"{name}: no pictures: {error}")
    return views, problems


def layers_of(view: View, kind: type[W]) -> list[tuple[str, W]]:
    """Return the layers of one kind (``AttentionWeights``, ``DepthwiseWeights``) by name, in module order."""
    return [(name or "(model)", found) for name, _, found in find_layers(view.net) if isinstance(found, kind)]


def spread(count: int, shown: int) -> list[int]:
    """Return up to ``shown`` indices below ``count``, evenly spread, the first and the last among them."""
    if count <= shown:
        return list(range(count))
    return [round(index * (count - 1) / (shown - 1)) for index in range(shown)]


def left_out(count: int, shown: int, things: str) -> str:
    """Return in words what a section shows of many things, e.g. ``(4 of 12 layers, evenly spread)``; empty for all."""
    return f" ({shown} of {count} {things}, evenly spread)" if count > shown else ""
