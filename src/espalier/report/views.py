"""Networks to take pictures of: the states of runs, with labels, and how their pictures are laid out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from espalier.errors import EspalierError
from espalier.init.layouts import find_layers
from espalier.report.raster import Panel, Row, Scale, picture_table
from espalier.report.section import Markup
from espalier.study.statistics import spread
from espalier.train import Run
from espalier.train.manifest import read_manifest

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


Found = list[tuple[View, list[tuple[str, W]]]]
"""Networks with what is drawn of each: layers, or what was computed from them, by name."""


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


def layers_of(views: Sequence[View], kind: type[W]) -> Found[W]:
    """Return the networks that have layers of one kind (``AttentionWeights``), and those by name, in module order."""
    found: Found[W] = []
    for view in views:
        layers: list[tuple[str, W]] = [
            (name or "(model)", layer) for name, _, layer in find_layers(view.net) if isinstance(layer, kind)
        ]
        if layers:
            found.append((view, layers))
    return found


def first_examples(views: Sequence[View]) -> tuple[list[tuple[View, Tensor | None]], list[str]]:
    """Return each network with the first test example of its own run, and in words whose data cannot be read.

    Examples are batches of one: arms may differ in the size of their images or in their vocabulary. A network without a
    run has None; one whose data cannot be read is left out.
    """
    # The same data are read once, however many arms share them.
    found: dict[str, Tensor] = {}
    pairs: list[tuple[View, Tensor | None]] = []
    problems: dict[str, None] = {}
    for view in views:
        if view.run is None:
            pairs.append((view, None))
            continue
        r = view.run.recipe
        try:
            key = repr((r.dataset, r.data_path, r.data_args, r.normalize, read_manifest(view.run.path)[1].get("data")))
            if key not in found:
                source = view.run.source()
                found[key] = next(iter(source.eval_batches(source.eval_splits[0], 1)))[0]
            pairs.append((view, found[key]))
        except (EspalierError, OSError) as error:
            problems[f"{view.name}: {error}" if view.name else str(error)] = None
    return pairs, list(problems)


def layer_pictures(
    title: str,
    found: Found[W],
    draw: Callable[[str, W], Sequence[Panel]],
    caption: str,
    *,
    scale: Scale = "diverging",
    shared: bool = False,
) -> Markup:
    """Return a table of pictures: a row a network, or a row a layer where there is one network only.

    Args:
        title: of the table.
        found: every network with its layers, as ``layers_of`` gives them.
        draw: name and weights of a layer to its panels.
        caption: what the pictures say; words on the layers that are left out and on the runs behind them follow.
        scale: as ``picture_table`` takes it.
        shared: likewise.
    """
    longest = max((layers for _, layers in found), key=len)
    if len(found) == 1:
        columns, rows = [""], [Row(name, [draw(name, weights)]) for name, weights in longest]
    else:
        shown = spread(len(longest), LAYERS)
        columns = [longest[index][0] for index in shown]
        # A network with fewer layers than the longest has gaps.
        rows = [
            Row(view.label, [draw(*layers[index]) if index < len(layers) else () for index in shown])
            for view, layers in found
        ]
        caption += left_out(len(longest), LAYERS, "layers")
    return picture_table(title, columns, rows, scale=scale, shared=shared, caption=caption + runs_behind(found))


def left_out(count: int, shown: int, things: str) -> str:
    """Return the sentence that says what is not shown, e.g. ``Shown are 4 of 12 layers, evenly spread.``"""
    return f" Shown are {shown} of {count} {things}, evenly spread." if count > shown else ""


def runs_behind(found: Found[Any]) -> str:
    """Return the sentence that says which runs the pictures are of; nothing for a network without a run."""
    runs = {view.name: view.run.recipe for view, _ in found if view.run is not None}
    if not runs:
        return ""
    if not any(runs):
        return " One run."
    return " One run an arm: " + ", ".join(f"{name} lr={r.lr:g} seed={r.seed}" for name, r in runs.items()) + "."
