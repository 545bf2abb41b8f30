"""One launcher for many trials: worker processes here or Slurm jobs, each draining the same list."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from espalier.errors import EspalierError, require
from espalier.files import write_bytes
from espalier.recipes import Recipe
from espalier.study.trial import FAILURE, Study, Trial
from espalier.train import RunInterrupted, train

RunTrial = Callable[[Recipe, Path], object]

# Note [Claims]
# A worker claims a trial with flock on a file beside the trials. The kernel drops the lock when its holder ends,
# however it ends, so a claim can never outlive its worker and nothing has to be cleaned up after a kill. The file
# itself is never deleted: a lock on a name that was deleted and made again would keep nobody out.
# Every worker walks the list once, trials that were begun before last. So a trial that kills its workers is met by one
# of them only, is reported, and in the next launch does not keep anyone from reaching the others.

# Note [Ctrl-C]
# A terminal sends it to every process of the launcher. submitit's controllers would print a traceback each and leave
# before their tasks, so they are started with the signal ignored; the workers turn it on again for themselves, stop
# at a checkpoint, and their controllers follow. Workers that have not come so far, and those that the signal did not
# reach, get SIGTERM.

_POLL_SECONDS = 0.5
_GRACE_SECONDS, _STOP_SECONDS = 1.0, 20.0
# submitit ends a local job after its time limit; ours end when the list does.
_NO_LIMIT_MINUTES = 60 * 24 * 365
_SLURM_LIMIT_MINUTES = 60 * 24


def run_trial(recipe: Recipe, path: Path) -> None:
    """Train one trial into its folder, without a progress bar."""
    train(recipe, path, resume="auto", progress=False)


def launch(
    study: Study,
    *,
    workers: int = 2,
    cluster: Literal["local", "slurm"] = "local",
    parameters: Mapping[str, Any] | None = None,
    run: RunTrial = run_trial,
    progress: bool | None = None,
) -> tuple[Trial, ...]:
    """Run every trial of a study that is not finished, and return those that failed.

    Each worker pays for its start once and drains the same list, whether it is a process here or a Slurm job. The CPU
    threads of this machine are shared out among local workers (a recipe's ``threads`` overrides), its GPUs go round.
    A trial that raises is recorded in its folder's ``failure.txt`` and the study goes on; the next launch tries it
    again. With ``workers`` 0 or 1 on this machine the trials run in this process.

    Args:
        study: the plan.
        workers: how many workers.
        cluster: ``"local"`` or ``"slurm"``; a Slurm job needs to see the study folder.
        parameters: further parameters of ``submitit.AutoExecutor``: ``slurm_partition``, ``timeout_min``,
            ``gpus_per_node``, ``cpus_per_task``.
        run: what trains one recipe into one folder.
        progress: print one line of progress; None prints it where standard error is a terminal.

    Raises:
        EspalierError: no such cluster, or a worker died and left trials unfinished.
        RunInterrupted: stopped from the keyboard; launching again goes on.
    """
    if cluster not in ("local", "slurm"):
        raise EspalierError(f"cluster {cluster!r}: choose 'local' or 'slurm'")
    if workers < 0:
        raise EspalierError(f"workers {workers}: give a number from 0")
    waiting = [trial for trial in study.trials() if not trial.finished]
    _forget_failures(study, waiting)
    meter = _Meter(study, sys.stderr.isatty() if progress is None else progress)
    workers = min(workers, len(waiting))
    try:
        if workers <= 1 and cluster == "local":
            drain(study, run, meter.show)
        elif workers:
            _drain_with_workers(study, workers, cluster, parameters or {}, run, meter)
    except KeyboardInterrupt:
        raise RunInterrupted(
            f"interrupted: {meter.done()} of {len(study.trials())} trials in {study.path} are done; "
            "the same command goes on with the rest"
        ) from None
    finally:
        meter.end()
    _refuse_unfinished(study)
    return tuple(trial for trial in study.trials() if trial.failure is not None)


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
    file_path = _claim_file(study, trial)
    file_path.parent.mkdir(exist_ok=True)
    with file_path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _claim_file(study: Study, trial: Trial) -> Path:
    return study.path / ".claims" / "_".join(trial.path.relative_to(study.path).parts[1:])


def _attempt(trial: Trial, run: RunTrial) -> None:
    try:
        run(trial.recipe, trial.path)
    except Exception as error:
        # The study outlives any trial; the first line is what the table shows.
        text = str(error) if isinstance(error, EspalierError) else f"{type(error).__name__}: {error}"
        details = "" if isinstance(error, EspalierError) else f"\n\n{traceback.format_exc()}"
        trial.path.mkdir(parents=True, exist_ok=True)
        write_bytes(trial.path / FAILURE, f"{' '.join(text.split())}{details}\n".encode())


def _forget_failures(study: Study, trials: Sequence[Trial]) -> None:
    for trial in trials:
        if trial.failure is None:
            continue
        with claim(study, trial) as mine:
            if mine:
                (trial.path / FAILURE).unlink(missing_ok=True)


@dataclass(frozen=True)
class _Worker:
    """What a worker process is given: submitit pickles it, and sends it again when Slurm takes its machine away."""

    study: Study
    run: RunTrial
    local: bool
    share: int
    """Workers that share this machine's threads."""
    gpu: str = ""
    """The GPU of a local worker; a Slurm job has those that Slurm gave it."""

    def __call__(self) -> None:
        if self.local:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.default_int_handler)
        if self.gpu:
            # Before anything touches CUDA, so that the worker's only device is number 0.
            os.environ["CUDA_VISIBLE_DEVICES"] = self.gpu
        torch.set_num_threads(max(1, torch.get_num_threads() // self.share))
        drain(self.study, self.run)

    def checkpoint(self) -> Any:
        """Return what submitit queues again after a time limit: the same list, on which finished trials are skipped."""
        return require("submitit.helpers", "train").DelayedSubmission(self)


def _drain_with_workers(
    study: Study, workers: int, cluster: str, parameters: Mapping[str, Any], run: RunTrial, meter: _Meter
) -> None:
    submitit = require("submitit", "train")
    local = cluster == "local"
    try:
        executor = submitit.AutoExecutor(folder=study.path / "logs", cluster=cluster)
    except RuntimeError as error:
        raise EspalierError(f"cluster {cluster!r} cannot be used here ({error}): choose 'local'") from error
    limit = _NO_LIMIT_MINUTES if local else _SLURM_LIMIT_MINUTES
    executor.update_parameters(**{"name": "espalier", "timeout_min": limit, **parameters})
    gpus = _gpus() if local else [""]
    jobs: list[Any] = []
    try:
        with _interrupt_ignored() if local else nullcontext():
            for index in range(workers):
                worker = _Worker(_absolute(study), run, local, workers if local else 1, gpus[index % len(gpus)])
                jobs.append(executor.submit(worker))
        while not all(job.done() for job in jobs):
            meter.show()
            time.sleep(_POLL_SECONDS)
    except BaseException:
        _stop(jobs, local)
        raise
    meter.show()
    left = sum(not trial.finished and trial.failure is None for trial in study.trials())
    # submitit waits long for the outcome of a process that left none.
    dead = [job for job in jobs if not job.paths.result_pickle.exists() or job.exception() is not None] if left else []
    if dead:
        raise EspalierError(
            f"{len(dead)} of {workers} workers died and {left} trials are unfinished: see {dead[0].paths.stderr}; "
            "the same command goes on with the rest"
        )


def _absolute(study: Study) -> Study:
    # A Slurm job need not start in this folder.
    return replace(study, path=study.path.resolve())


def _gpus() -> list[str]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())] or [""]


@contextmanager
def _interrupt_ignored() -> Iterator[None]:
    """Start processes that ignore Ctrl-C (Note [Ctrl-C]); only the main thread may say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _stop(jobs: Sequence[Any], local: bool) -> None:
    """End the workers, and wait until they have let go of their trials, so that the next launch finds them free."""
    started, reminded = time.monotonic(), 0.0
    while not all(job.done() for job in jobs) and time.monotonic() < started + _STOP_SECONDS:
        now = time.monotonic()
        if now > max(started + _GRACE_SECONDS * local, reminded + _GRACE_SECONDS):
            for job in jobs:
                if not local:
                    job.cancel(check=False)
                elif not job.done():
                    os.kill(int(job.job_id), signal.SIGTERM)
            reminded = now
        time.sleep(0.05)


def _refuse_unfinished(study: Study) -> None:
    left = [trial for trial in study.trials() if not trial.finished and trial.failure is None]
    if left:
        raise EspalierError(
            f"{len(left)} trials of {study.path} are unfinished, the first is {left[0]}: another process is at work on "
            "them or was killed; the same command goes on with them"
        )


class _Meter:
    """One line on a terminal: how many trials are done and how long the rest may take."""

    def __init__(self, study: Study, visible: bool) -> None:
        self._trials = study.trials()
        self._visible = visible
        self._started = time.monotonic()
        self._before = self.done()

    def done(self) -> int:
        """Return how many trials have ended, well or badly."""
        return sum(trial.finished or trial.failure is not None for trial in self._trials)

    def show(self) -> None:
        """Write the line anew."""
        if not self._visible:
            return
        done = self.done()
        text = f"{done}/{len(self._trials)} trials"
        failed = sum(trial.failure is not None for trial in self._trials)
        if failed:
            text += f", {failed} failed"
        if self._before < done < len(self._trials):
            each = (time.monotonic() - self._started) / (done - self._before)
            text += f", about {_duration(each * (len(self._trials) - done))} left"
        print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Leave the line."""
        if self._visible:
            print(file=sys.stderr)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
