"""Stand-ins for training that worker processes can import (the tests put this folder on PYTHONPATH)."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch

from espalier.errors import EspalierError
from espalier.study import Trial
from fabricated_runs import fabricate_trial


def note(trial: Trial) -> None:
    """Leave a line saying which process ran what, with how many threads."""
    line = f"{os.getpid()} {trial.arm} {trial.lr:g} {trial.seed} {torch.get_num_threads()}\n"
    with (Path(os.environ["ESPALIER_TEST_LOG"])).open("a") as file:
        file.write(line)


def quick(trial: Trial) -> None:
    note(trial)
    time.sleep(0.3)
    fabricate_trial(trial)


def together(trial: Trial) -> None:
    """Hold every trial until a second process has one, too: on a busy machine the first could take them all."""
    note(trial)
    log, late = Path(os.environ["ESPALIER_TEST_LOG"]), time.monotonic() + 120
    while len({line.split()[0] for line in log.read_text().splitlines()}) < 2 and time.monotonic() < late:
        time.sleep(0.05)
    fabricate_trial(trial)


def fail_on_seed_one(trial: Trial) -> None:
    note(trial)
    if trial.seed == 1:
        raise EspalierError("batch_size 9 is too large") if trial.arm == "default" else RuntimeError("two\nlines")
    fabricate_trial(trial)


def die_on_seed_one(trial: Trial) -> None:
    note(trial)
    if trial.seed == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    fabricate_trial(trial)


def slow(trial: Trial) -> None:
    note(trial)
    time.sleep(60)


def counted(trial: Trial) -> None:
    """Count to 30, a line a step, and go on where an earlier attempt was stopped."""
    note(trial)
    trial.path.mkdir(parents=True, exist_ok=True)
    steps = trial.path.parent / f"{trial.path.name}.steps"
    done = len(steps.read_text().splitlines()) if steps.exists() else 0
    for step in range(done, 30):
        time.sleep(0.2)
        with steps.open("a") as file:
            file.write(f"{step}\n")
    fabricate_trial(trial)
