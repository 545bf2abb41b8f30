"""Deadlines, and medians of many calls on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch


class Clock:
    """A deadline.

    Args:
        deadline: a moment of ``time.monotonic()``.
    """

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline

    def left(self) -> float:
        """Return the seconds that are left, 0 at the least."""
        return max(0.0, self.deadline - time.monotonic())

    def over(self) -> bool:
        """Return whether the deadline has passed."""
        return self.left() == 0


class Timing(NamedTuple):
    """Milliseconds of one call, over ``n`` calls, and what it allocates beyond what was there."""

    median_ms: float
    least_ms: float
    n: int
    peak_mib: float | None


def measure(function: Callable[[], object], device: str, *, seconds: float = 1.0, most: int = 100) -> Timing:
    """Time many calls of ``function`` after some that warm up: by events on CUDA, by the wall clock elsewhere.

    Events stand around every call, so that the host's launches count where they are what takes long. Three calls warm
    up and five are timed at the least, two and three of those that take longer than ``seconds``.

    Args:
        function: what is timed.
        device: ``cuda`` or ``cpu``.
        seconds: stop after this long.
        most: stop after this many calls.
    """
    cuda = device == "cuda"
    function()
    _wait(cuda)
    started = time.monotonic()
    function()
    _wait(cuda)
    fewest = 3 if time.monotonic() - started > seconds else 5
    if fewest == 5:
        function()
    peak = None
    if cuda:
        _wait(cuda)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        _wait(cuda)
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    times: list[float] = []
    end = time.monotonic() + seconds
    while len(times) < fewest or (len(times) < most and time.monotonic() < end):
        if cuda:
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            function()
            last.record()
            last.synchronize()
            times.append(first.elapsed_time(last))
        else:
            start = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - start))
    return Timing(statistics.median(times), min(times), len(times), peak)


def _wait(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()
