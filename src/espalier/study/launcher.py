"""One launcher for many trials: worker processes here or Slurm jobs, each draining the same list."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

import torch

from espalier.errors import EspalierError, require_known
from espalier.recipes import Recipe
from espalier.recipes.validation import FILE_FIELDS, resolve_recipe
from espalier.study.slurm import require_slurm, run_jobs
from espalier.study.trial import FAILURE, Study, Trial
from espalier.study.worker import RunTrial, Worker, claim, drain
from espalier.train import RunInterrupted, train
from espalier.train.requests import RESUMABLE, Requests

_POLL_SECONDS = 0.2
_STOP_SECONDS = 20.0
_START = "from espalier.study.worker import main; main()"


def run_recipe(trial: Trial) -> None:
    """Train one trial's recipe into its folder, without a progress bar.

    Raises:
        EspalierError: the study trains by a function of the user's own, which only ``espalier.compare`` is given.
    """
    if not isinstance(trial.recipe, Recipe):
        raise EspalierError(f"{trial.recipe.name} trains this study: call espalier.compare with that function")
    train(trial.recipe, trial.path, resume="auto", progress=False)


def launch(
    study: Study,
    *,
    workers: int = 2,
    cluster: Literal["local", "slurm"] = "local",
    parameters: Mapping[str, Any] | None = None,
    run: RunTrial = run_recipe,
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
        parameters: options of Slurm's ``sbatch`` by their long names: ``partition``, ``time``, ``gpus``, ``account``.
        run: what runs one trial.
        progress: print one line of progress; None prints it where standard error is a terminal.

    Raises:
        EspalierError: no such cluster, started by torchrun, a finished trial that is not one of this study, or a worker
            died and left trials unfinished.
        RunInterrupted: stopped from the keyboard or by a signal; launching again goes on.
    """
    check_launch(study, workers=workers, cluster=cluster, parameters=parameters, run=run)
    waiting = [trial for trial in study.trials() if not trial.finished]
    _forget_failures(study, waiting)
    meter = _Meter(study, sys.stderr.isatty() if progress is None else progress)
    workers = min(workers, len(waiting))
    requests = Requests()
    try:
        with requests:
            if cluster == "slurm" and workers:
                run_jobs(Worker.of(study, run), study.path / "logs", workers, parameters or {}, meter.show)
            elif workers > 1:
                _drain_with_processes(study, run, workers, meter)
            else:
                drain(study, run, meter.show)
    except KeyboardInterrupt as stop:
        done = f"{meter.done()} of {len(study.trials())} trials in {study.path} are done"
        raise _interruption(stop, requests, f"{done}; run the same command again to resume") from None
    finally:
        meter.end()
    left = _unfinished(study)
    if left:
        raise EspalierError(
            f"{len(left)} trials of {study.path} are unfinished, the first is {left[0]}: another process is at work on "
            f"them or was killed (logs: {study.path / 'logs'}); run the same command again to resume"
        )
    return tuple(trial for trial in study.trials() if trial.failure is not None)


def check_launch(
    study: Study, *, workers: int, cluster: str, parameters: Mapping[str, Any] | None, run: RunTrial
) -> None:
    """Refuse whatever ``launch`` would refuse before its first trial, touching nothing; arguments are those of it.

    Raises:
        EspalierError: as ``launch`` does.
    """
    require_known("cluster", cluster, ("local", "slurm"))
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
        raise EspalierError(f"workers {workers!r}: give a whole number from 0")
    if parameters and cluster != "slurm":
        raise EspalierError(f"{', '.join(parameters)}: options of Slurm's jobs: add --cluster slurm")
    refuse_torchrun()
    _refuse_unpinned_files(study)
    study.outcomes()  # which refuses what is no trial of this study, before hours are spent beside it
    waiting = sum(not trial.finished for trial in study.trials())
    if cluster == "slurm" and min(workers, waiting):
        require_slurm(study.path, parameters or {})
        Worker.of(study, run)
    elif min(workers, waiting) > 1:
        Worker.of(study, run)


def _interruption(stop: KeyboardInterrupt, requests: Requests, message: str) -> RunInterrupted:
    if requests.signal is not None:
        return requests.interruption(message)
    status = stop.status if isinstance(stop, RunInterrupted) else 130  # of a trial that ran in this process
    return RunInterrupted(f"{'stopped' if status == RESUMABLE else 'interrupted'}: {message}", status)


def refuse_torchrun() -> None:
    """Refuse to be one of many processes that would fight over the trials.

    Raises:
        EspalierError: torchrun started this process.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise EspalierError("a comparison starts its own workers: run it without torchrun, with as many --workers")


def _refuse_unpinned_files(study: Study) -> None:
    """Refuse a plan that names files and not what they held: its trials could not be told from those of other files."""
    for trial in {trial.arm: trial for trial in study.trials() if not trial.finished}.values():
        if isinstance(trial.recipe, Recipe):
            now = resolve_recipe(trial.recipe)
            for name in FILE_FIELDS:
                if getattr(now, name) != getattr(trial.recipe, name):
                    raise EspalierError(
                        f"{study.path}: {name} of arm {trial.arm!r} name a file that the plan does not pin to what it "
                        "holds, as an earlier version wrote it: plan the study again in another folder"
                    )


def _forget_failures(study: Study, trials: Sequence[Trial]) -> None:
    for trial in trials:
        if trial.failure is None:
            continue
        with claim(study, trial) as mine:
            if mine:
                (trial.path / FAILURE).unlink(missing_ok=True)


def _unfinished(study: Study) -> list[Trial]:
    return [trial for trial in study.trials() if not trial.finished and trial.failure is None]


def _drain_with_processes(study: Study, run: RunTrial, count: int, meter: _Meter) -> None:
    worker = Worker.of(study, run, count)
    task = pickle.dumps(worker)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(worker.folders)}  # the same espalier, too
    logs = [study.path / "logs" / f"worker-{index}.log" for index in range(count)]
    logs[0].parent.mkdir(exist_ok=True)
    gpus, command = _gpus(), [sys.executable, "-c", _START]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for index, path in enumerate(logs):
            # Set before anything touches CUDA, so that the worker's only device is number 0.
            env = {**environment, "CUDA_VISIBLE_DEVICES": gpus[index % len(gpus)]} if gpus else environment
            with path.open("ab") as log:
                processes.append(
                    subprocess.Popen(
                        command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=env, start_new_session=True
                    )
                )
        for process in processes:
            with suppress(BrokenPipeError):  # one that died at once is reported below
                _pipe(process).write(task)
                _pipe(process).flush()
        while any(process.poll() is None for process in processes):
            meter.show()
            time.sleep(_POLL_SECONDS)
    finally:
        _end(processes)
    meter.show()
    dead = [path for process, path in zip(processes, logs, strict=True) if process.returncode]
    if dead and (left := _unfinished(study)):
        raise EspalierError(
            f"{len(dead)} of {count} workers died and {len(left)} trials are unfinished: see {dead[0]}; "
            "run the same command again to resume"
        )


def _pipe(process: subprocess.Popen[bytes]) -> Any:
    assert process.stdin is not None
    return process.stdin


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Tell the workers to stop, and wait until they have let go of their trials: the next launch finds them free."""
    for process in processes:
        with suppress(BrokenPipeError):
            _pipe(process).close()
    deadline = time.monotonic() + _STOP_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _gpus() -> list[str]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]


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
