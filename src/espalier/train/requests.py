"""What a run is asked to do between two steps: save because it is time, or save and stop because of a signal."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

NOTHING, SAVE, STOP = 0, 1, 2
RESUMABLE = 75
"""Exit status of a run that a scheduler stopped after it had written a checkpoint (EX_TEMPFAIL: try again)."""

# SIGTERM is a scheduler's or an operator's word, SIGUSR1 what Slurm sends ahead of a time limit on demand.
_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")


class RunInterrupted(KeyboardInterrupt):
    """A run was stopped by Ctrl-C or a signal; its message says how to go on. No ``except Exception`` swallows it.

    Args:
        message: what happened and how to go on.
        status: the exit status of a command that it ends.
    """

    def __init__(self, message: str = "", status: int = 130) -> None:
        super().__init__(message)
        self.status = status


class Requests:
    """Listens for SIGINT, SIGTERM and SIGUSR1 for the length of a ``with`` block, and keeps the time between saves.

    Each ends the block at once (KeyboardInterrupt), but within ``noted`` it waits for who looks at ``pending``; a
    second Ctrl-C is obeyed at once there, too. Signals that somebody else handles (or ignores) are left to them, and so
    are all signals outside the main thread, which alone may handle them.

    Args:
        minutes: save when this long has passed since the last save; None never does.
    """

    def __init__(self, minutes: float | None = None) -> None:
        self._seconds = None if minutes is None else 60 * minutes
        self._saved = time.monotonic()
        self._before: dict[int, Any] = {}
        self._noting = False
        self.signal: signal.Signals | None = None

    def __enter__(self) -> Self:
        free = (signal.SIG_DFL, signal.default_int_handler)
        if threading.current_thread() is threading.main_thread():
            for number in [each for each in signal.Signals if each.name in _NAMES]:  # Windows has no SIGUSR1
                handler = signal.getsignal(number)
                # A study listens, too; while a trial of it runs in this process, the trial has something to save.
                if handler in free or isinstance(getattr(handler, "__self__", None), Requests):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Let signals wait for the length of a ``with`` block: there is something to save first."""
        self._noting = True
        try:
            yield
        finally:
            self._noting = False

    def pending(self) -> int:
        """Return what this process is asked for now."""
        if self.signal is not None:
            return STOP
        late = self._seconds is not None and time.monotonic() - self._saved >= self._seconds
        return SAVE if late else NOTHING

    def saved(self) -> None:
        """Count the minutes from now."""
        self._saved = time.monotonic()

    def interruption(self, message: str) -> RunInterrupted:
        """Return the exception that ends the run; a process that another one's signal stops is resumable."""
        number = self.signal or signal.SIGTERM
        if number == signal.SIGINT:
            return RunInterrupted(f"interrupted: {message}")
        return RunInterrupted(f"stopped by {number.name}: {message}", RESUMABLE)

    def _note(self, number: int, frame: FrameType | None) -> None:
        at_once = not self._noting or (self.signal is not None and number == signal.SIGINT)
        self.signal = signal.Signals(number)
        if at_once:
            raise KeyboardInterrupt
