"""What a worker does: claim one trial after the other of a study's list and run it, here, in a process or in a job."""

from __future__ import annotations

import _thread
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from espalier.errors import EspalierError, require, told
from espalier.files import lock_at, write_bytes
from espalier.heap import keep_freed_memory
from espalier.study.trial import FAILURE, Study, Trial

RunTrial = Callable[[Trial], object]

# Note [Claims]
# A worker claims a trial with a lock on a file beside the trials. The system drops the lock when its holder ends,
# however it ends, so a claim can never outlive its worker and nothing has to be cleaned up after a kill; where the file
# system has no such locks, Note [Locks] of ``files`` says what is done.
# Every worker walks the list once, trials that were begun before last. So a trial that kills its workers is met by one
# of them only, is reported, and in the next launch does not keep anyone from reaching the others.

# Note [Stopping]
# The launcher holds the other end of a local worker's standard input. When that end closes, because the launcher
# stops its workers or because it was killed, the worker gets what Ctrl-C sends, stops at a checkpoint and ends. So no
# worker outlives its launcher, and no signal has to reach a process on any system. Workers have a session of their
# own: Ctrl-C on a terminal reaches the launcher alone.

_GRACE_SECONDS = 15.0


def drain(study: Study, run: RunTrial, after: Callable[[], None] = lambda: None) -> None:
    """Run every trial that is neither finished, nor failed, nor claimed by another worker (Note [Claims])."""
    for trial in sorted(study.trials(), key=lambda trial: _claim_file(study, trial).exists()):
        with claim(study, trial) as mine:
            if mine and not trial.finished and trial.failure is None:
                _attempt(trial, run)
        after()


@contextmanager
def claim(study: Study, trial: Trial) -> Iterator[bool]:
    """Claim a trial for the length of a ``with`` block; yields whether it was free (Note [Claims])."""
    from filelock import Timeout

    file = _claim_file(study, trial)
    file.parent.mkdir(exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(lock_at(file))
            free = True
        except Timeout:
            free = False
        yield free


def _claim_file(study: Study, trial: Trial) -> Path:
    return study.path / ".claims" / "_".join(trial.path.relative_to(study.path).parts[1:])


def _attempt(trial: Trial, run: RunTrial) -> None:
    try:
        run(trial)
    except (Exception, SystemExit) as error:  # a trial that calls exit() ends itself, and no other
        # The study outlives any trial; the first line is what the table shows.
        text = str(error) if isinstance(error, EspalierError) else f"{told(error)}\n\n{traceback.format_exc()}"
        trial.path.mkdir(parents=True, exist_ok=True)
        write_bytes(trial.path / FAILURE, f"{text}\n".encode())


@dataclass(frozen=True)
class Worker:
    """What a worker process or a Slurm job is given."""

    task: bytes
    """The study and what runs its trials, pickled: unpickling imports the user's modules, which need ``folders``."""
    folders: tuple[str, ...]
    """Where the launcher finds modules."""
    share: int = 1
    """Workers that share this machine's threads."""

    @classmethod
    def of(cls, study: Study, run: RunTrial, share: int = 1) -> Worker:
        """Return a worker for a study; its folder may be relative, and a function may stand in a script or notebook.

        Raises:
            EspalierError: what runs the trials cannot be pickled.
        """
        study = replace(study, path=study.path.resolve())  # a Slurm job need not start in this folder
        try:
            task = require("cloudpickle", "train").dumps((study, run))
        except Exception as error:  # pickling raises whatever the object raises
            raise EspalierError(
                f"train cannot be sent to workers ({type(error).__name__}: {error}): let it keep no open files, locks "
                "or generators, or use workers=0"
            ) from error
        return cls(task, tuple(map(os.path.abspath, sys.path)), share)

    def __call__(self) -> None:
        """Drain the list."""
        sys.path += [folder for folder in self.folders if folder not in sys.path]
        study, run = pickle.loads(self.task)  # a function has no other form, and its own launcher made it
        keep_freed_memory()
        torch.set_num_threads(max(1, torch.get_num_threads() // self.share))
        drain(study, run)


def main() -> None:
    """Run the worker that the launcher writes to standard input, and end when that input ends (Note [Stopping])."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell that runs in the background starts with SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    worker = pickle.load(sys.stdin.buffer)  # a pipe from the launcher that started this process
    launcher = os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # a trial that reads its input must not wait for the launcher
    threading.Thread(target=_stop_with, args=(launcher,), daemon=True).start()
    try:
        worker()
    except KeyboardInterrupt:
        sys.exit(130)


def _stop_with(launcher: int) -> None:
    os.read(launcher, 1)
    if hasattr(signal, "pthread_kill"):  # this one also ends a sleep or a read
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    else:
        _thread.interrupt_main()
    time.sleep(_GRACE_SECONDS)
    os._exit(130)
