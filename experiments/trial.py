"""One trial of the queue in a process of its own: ``python -m experiments.trial``; the queue starts it."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from pathlib import Path

from filelock import FileLock, Timeout

from espalier.errors import EspalierError
from espalier.heap import keep_freed_memory
from espalier.study import add_records, record_run
from espalier.train import RunInterrupted, train
from experiments.scheduler import BUSY, known_records, load_order


def main(order: str, name: str, arm: str, lr: str, seed: str, out: str, committed: str) -> int:
    """Train, add the record, and clear the run folder away; return the exit status."""
    if hasattr(os, "nice"):
        os.nice(int(os.environ.get("QUEUE_NICE", "19")))  # tests wait for their trials, beside other tests
    keep_freed_memory()
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    experiment = next(each for each in load_order(order) if each.name == name)
    folder = Path(out)
    claim = folder / "claims" / f"{name}_{arm}_lr={lr}_seed={seed}.lock"
    claim.parent.mkdir(parents=True, exist_ok=True)
    try:
        # Held until this process ends, however it ends, so that nobody else trains into the same folder.
        with FileLock(claim, blocking=False):
            records = known_records([Path(committed), folder / "records"])
            trial = experiment.study(folder, records).trial(arm, float(lr), int(seed))
            if trial.record is None:
                run = train(trial.recipe, trial.path, resume="auto", progress=False)
                diverged = run.result is None or run.result["diverged"]
                extra = None if experiment.measure is None else {} if diverged else experiment.measure(run)
                add_records([record_run(run, name, arm, extra)], folder / "records" / f"{name}.jsonl")
            shutil.rmtree(trial.path, ignore_errors=True)
    except Timeout:
        return BUSY
    except RunInterrupted as stop:  # by a signal: the next queue goes on where it was
        print(f"{name}: {arm} lr={lr} seed={seed}: {stop}", file=sys.stderr)
        return BUSY
    except EspalierError as error:
        print(f"{name}: {arm} lr={lr} seed={seed}: {error}", file=sys.stderr)
        return 2
    return 0


def _end_with_parent(parent: int) -> None:
    # A queue that was killed cannot end its trials; on Windows a child keeps the number of a parent that is gone.
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
