"""What a person watching a run sees, and the clock that times its steps."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

from espalier.errors import require

Advance = Callable[[int, str], None]


@contextmanager
def progress_bar(name: str, total: int, done: int, show: bool | None) -> Iterator[Advance]:
    """Show a bar with rate and remaining time on standard error for the length of a ``with`` block.

    Args:
        name: the run's name.
        total: optimiser steps of the whole run.
        done: steps already done by an earlier part of the run.
        show: show it; None shows it where standard error is a terminal.

    Yields:
        A function that takes the number of steps just done and a note (the last scores; empty keeps the old one).
    """
    if not (sys.stderr.isatty() if show is None else show):
        yield lambda steps, note: None
        return
    rich = require("rich.progress", "train")
    console = require("rich.console", "train").Console(stderr=True)
    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TextColumn("{task.fields[rate]}"),
        rich.TimeElapsedColumn(),
        rich.TimeRemainingColumn(),
        rich.TextColumn("{task.fields[note]}"),
    )
    with rich.Progress(*columns, console=console) as bar:
        task = bar.add_task(name, total=total, completed=done, rate="", note="")
        started, here = time.perf_counter(), 0

        def advance(steps: int, note: str) -> None:
            nonlocal here
            here += steps
            fields: dict[str, Any] = {"note": note} if note else {}
            if steps:
                fields["rate"] = f"{here / (time.perf_counter() - started):.1f} steps/s"
            bar.update(task, advance=steps, **fields)

        yield advance


class StepClock:
    """Times every optimiser step without making the host wait for the device: events on CUDA, wall clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []
        self._steps: list[float] = []

    def mark(self) -> None:
        """Note the end of a step (or, as the first mark after ``stop``, the start of the first one)."""
        mark: Any = torch.cuda.Event(enable_timing=True) if self._cuda else time.perf_counter()
        if self._cuda:
            mark.record()
        self._marks.append(mark)

    def stop(self) -> float:
        """Wait for the device and return the seconds between the first and the last mark since the last stop."""
        if self._cuda:
            torch.cuda.synchronize()
        spans = [a.elapsed_time(b) / 1e3 if self._cuda else b - a for a, b in pairwise(self._marks)]
        self._marks = []
        self._steps += spans
        return sum(spans)

    def median(self) -> float | None:
        """Return the median seconds of the steps timed since the last call, None if there were none."""
        steps, self._steps = self._steps, []
        return statistics.median(steps) if steps else None
