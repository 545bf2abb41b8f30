"""Slurm jobs that each drain a study's list of trials: submitted, watched and ended by Slurm's own commands."""

from __future__ import annotations

import hashlib
import os
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from espalier.errors import EspalierError
from espalier.files import write_bytes
from espalier.train.requests import RESUMABLE

# Note [Jobs]
# The queue itself says what is left to wait for: jobs are found by their name, which derives from the study's folder.
# So nothing is written down that a kill could make untrue, accounting (sacct) is not asked for, and a launcher that was
# killed finds the jobs that it left behind: they went on without it. What a job was in the middle of lies in its run
# folder: a job that Slurm preempts, requeues or moves to another machine resumes there, and one that is cancelled
# leaves it to the next. Ahead of a time limit Slurm sends SIGUSR1; the run writes a checkpoint, and the job puts itself
# back into the queue.

_POLL_SECONDS = 5.0
_STOP_SECONDS = 60.0
_WARNING_SECONDS = 120


def run_jobs(
    worker: Callable[[], object], logs: Path, count: int, options: Mapping[str, Any], tick: Callable[[], None]
) -> None:
    """Let ``count`` jobs run ``worker``, and return when none of them is left in the queue (Note [Jobs]).

    Args:
        worker: what a job runs; it is pickled, and every job needs to see the files that it names.
        logs: folder of the jobs' output; it belongs to the study alone.
        count: how many jobs; those that an earlier launcher left in the queue are counted.
        options: options of ``sbatch`` by their long names, without the dashes: ``partition``, ``time``, ``gpus``.
        tick: called at every look at the queue.

    Raises:
        EspalierError: there is no Slurm here, or it refuses the job.
    """
    logs.mkdir(parents=True, exist_ok=True)
    digest = hashlib.blake2b(str(logs.resolve()).encode(), digest_size=6).hexdigest()
    # A comma would part two names where Slurm is asked for its jobs.
    name = f"espalier-{logs.resolve().parent.name}-{digest}".replace(",", "_")
    task = logs / "slurm-task.pickle"
    try:
        write_bytes(task, pickle.dumps(worker))
        for _ in range(count - len(_queued(name) or ())):
            _submit(name, task, options)
        while _queued(name) != set():
            tick()
            time.sleep(_POLL_SECONDS)
    except BaseException:
        # The next launch must find the trials free, so wait until the jobs have let go of them.
        deadline = time.monotonic() + _STOP_SECONDS
        _slurm("scancel", "--me", f"--name={name}")  # once even where the queue does not answer
        while _queued(name) and time.monotonic() < deadline:
            time.sleep(1)
            _slurm("scancel", "--me", f"--name={name}")
        raise


def require_slurm(folder: Path, options: Mapping[str, Any]) -> None:
    """Refuse to go on where Slurm's commands are not, or would lose the jobs of a study.

    Raises:
        EspalierError: one of the commands is missing, or the jobs are given another name or a path that Slurm misreads.
    """
    if "job-name" in options:
        raise EspalierError(
            f"job-name {options['job-name']}: a study finds its jobs by a name of its own: leave it out"
        )
    if "\\" in str(folder.resolve()):  # after one Slurm replaces no symbols, and all jobs would write one file
        raise EspalierError(f"{folder}: Slurm misreads a path with a backslash: choose another folder")
    for command in ("sbatch", "squeue"):
        if shutil.which(command) is None:
            raise _missing(command)


def _missing(command: str) -> EspalierError:
    return EspalierError(f"cluster 'slurm' cannot be used here (no {command}): choose 'local'")


def _submit(name: str, task: Path, options: Mapping[str, Any]) -> None:
    command = [sys.executable, "-c", "from espalier.study.slurm import main; main()", str(task.resolve())]
    # The shell becomes the program: what Slurm sends to "the batch shell" (B:) reaches the trial itself.
    script = f"#!/bin/sh\nexec {shlex.join(command)}\n"
    fixed = {
        "output": f"{task.parent.resolve()}/".replace("%", "%%") + "slurm-%j.log",  # to Slurm a % begins a symbol
        "open-mode": "append",
        "signal": f"B:USR1@{_WARNING_SECONDS}",
    }
    given = [f"--{key}={value}" for key, value in {**fixed, **options}.items() if value is not None]
    given.append(f"--job-name={name}")  # last, and so whatever abbreviation of it was given
    folders = os.pathsep.join(map(os.path.abspath, sys.path))
    done = _slurm("sbatch", "--parsable", "--requeue", *given, script=script, PYTHONPATH=folders)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1].removeprefix("sbatch: error: ")
        raise EspalierError(f"Slurm refuses the job ({reason}): change {', '.join(given[3:-1]) or 'its configuration'}")


def _queued(name: str) -> set[str] | None:
    """Return the jobs of that name that wait, run or end now; None where Slurm does not answer."""
    done = _slurm("squeue", "--me", "--noheader", f"--name={name}", "--format=%i")
    return None if done.returncode else set(done.stdout.split())


def _slurm(*command: str, script: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    try:
        return subprocess.run(command, input=script, env=env, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise _missing(command[0]) from error


def main() -> None:
    """Run the worker of the file that the command line names, as a job."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # a run's own handling takes over from this
        signal.signal(number, signal.default_int_handler)
    torch.set_num_threads(int(os.environ.get("SLURM_CPUS_ON_NODE", "1")))
    started = time.monotonic()
    with open(sys.argv[1], "rb") as file:
        worker = pickle.load(file)  # which the launcher of this study wrote for its own jobs
    try:
        worker()
    except KeyboardInterrupt as error:
        print(f"stopped: {error}", file=sys.stderr)
        # A limit so short that the warning comes at once would be met again and again.
        if time.monotonic() - started > _WARNING_SECONDS / 2 and _time_is_up():
            _slurm("scontrol", "requeue", os.environ["SLURM_JOB_ID"])
        sys.exit(RESUMABLE)


def _time_is_up() -> bool:
    # Whoever cancels or preempts a job sends a signal, too, and wants no more of it here: only the clock decides.
    done = _slurm("squeue", "--noheader", f"--jobs={os.environ['SLURM_JOB_ID']}", "--states=RUNNING", "--format=%L")
    left = done.stdout.strip().replace("-", ":").split(":")
    if not all(part.isdigit() for part in left):
        return False  # UNLIMITED, or not running any more
    seconds = sum(int(part) * unit for part, unit in zip(reversed(left), (1, 60, 3600, 86400), strict=False))
    return seconds <= _WARNING_SECONDS + 60  # Slurm may be a minute early
