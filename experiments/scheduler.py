"""The queue behind ``experiments/queue.py``: which trial is next, and processes that run it until the deadline."""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from espalier.errors import EspalierError
from espalier.study import Record, Trial
from espalier.study.records import combine, read_records
from experiments.experiment import BATCH, Experiment

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = ROOT / "docs" / "results" / "records"
ORDER = "experiments.order:ORDER"
BUSY = 75
"""Exit status of a trial that another queue has claimed."""
_POLL_SECONDS, _GRACE_SECONDS = 0.2, 20.0

Item = tuple[Experiment, Trial]


def load_order(name: str) -> Sequence[Experiment]:
    """Return the experiments in the order of their worth, from ``module:NAME``."""
    module, _, attribute = name.partition(":")
    order: Sequence[Experiment] = getattr(importlib.import_module(module), attribute)
    return order


def known_records(folders: Iterable[Path]) -> list[Record]:
    """Read every file of records in some folders, one record a trial.

    Raises:
        EspalierError: a line that is no record, or records that contradict each other.
    """
    files = [file for folder in folders if folder.is_dir() for file in sorted(folder.glob("*.jsonl"))]
    return combine(record for file in files for record in read_records(file))


def missing(order: Sequence[Experiment], out: Path, records: Sequence[Record]) -> Iterator[Item]:
    """Yield the missing trials in the order of their worth.

    First what every row of the table needs, experiment after experiment; then the other planned seeds, one experiment
    after the other; then the seeds that Note [Seeds] of ``experiments.experiment`` adds, a batch for each in turn.
    """
    rows = [each.row(out, records) for each in order]
    planned = [each.first(out, records) for each in order]
    for plans, begun in ((rows, [()] * len(rows)), (planned, [row.seeds for row in rows])):
        for experiment, study, seeds in zip(order, plans, begun, strict=True):
            yield from ((experiment, t) for t in study.trials() if t.seed not in seeds and not t.finished)
    added = [(each, [t for t in each.study(out, records).trials() if t.seed >= each.seeds]) for each in order]
    for batch in range(max((len(each.study(out, records).seeds) for each in order), default=0) // BATCH + 1):
        for experiment, trials in added:
            seeds = range(experiment.seeds + batch * BATCH, experiment.seeds + (batch + 1) * BATCH)
            yield from ((experiment, trial) for trial in trials if trial.seed in seeds and not trial.finished)


class Queue:
    """Trials in processes of their own, at low priority and with one thread each, until the deadline."""

    def __init__(self, order: str, out: Path, cores: int, only: Sequence[str], committed: Path = COMMITTED) -> None:
        self.name, self.out, self.cores, self.committed = order, out, cores, committed
        self.order = [each for each in load_order(order) if not only or each.name in only]
        if not self.order:
            raise EspalierError(f"only {' '.join(only)}: no such experiment: --list shows their names")
        self.running: dict[subprocess.Popen[bytes], Item] = {}
        self.passed: set[Path] = set()
        """Trials that failed or that another queue has: not taken again in this session."""
        self.done, self.failed, self.stopping = 0, 0, False

    def records(self) -> list[Record]:
        """Return all records that are known here."""
        return known_records([self.committed, self.out / "records"])

    def run(self, seconds: float) -> None:
        """Work until the deadline, a signal, or the end of the list."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)
        end = time.monotonic() + seconds
        self._clear_finished()
        waiting = missing(self.order, self.out, self.records())
        while not self.stopping and time.monotonic() < end:
            while len(self.running) < self.cores and (item := self._next(waiting)) is not None:
                self._start(item)
            if not self.running:
                break
            time.sleep(_POLL_SECONDS)
            if self._reap():
                waiting = missing(self.order, self.out, self.records())
        left = len(self.running)
        self._end_running()
        print(f"queue: {self.done} trials finished, {self.failed} failed, {left} stopped before their end", flush=True)

    def _next(self, waiting: Iterator[Item]) -> Item | None:
        taken = {trial.path for _, trial in self.running.values()} | self.passed
        return next((item for item in waiting if item[1].path not in taken), None)

    def _start(self, item: Item) -> None:
        experiment, trial = item
        command = [sys.executable, "-m", "experiments.trial", self.name, experiment.name, trial.arm, repr(trial.lr)]
        command += [str(trial.seed), str(self.out.resolve()), str(self.committed.resolve())]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": path}
        # A session of its own: Ctrl-C reaches the queue, which then ends its trials.
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        self.running[process] = item
        print(f"{time.strftime('%H:%M:%S')} {experiment.name}: {trial}", flush=True)

    def _reap(self) -> bool:
        """Take note of trials that have ended, and return whether any has."""
        ended = [process for process in self.running if process.poll() is not None]
        for process in ended:
            experiment, trial = self.running.pop(process)
            if process.returncode == 0:
                self.done += 1
            else:
                self.passed.add(trial.path)
                self.failed += process.returncode != BUSY
                if process.returncode != BUSY:
                    print(f"failed with status {process.returncode}: {experiment.name}: {trial}", flush=True)
        return bool(ended)

    def _stop(self, number: int, frame: object) -> None:
        self.stopping = True

    def _end_running(self) -> None:
        for process in self.running:
            process.terminate()
        end = time.monotonic() + _GRACE_SECONDS
        for process in self.running:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _clear_finished(self) -> None:
        """Delete the run folders of finished trials: what a kill between record and clearing away left."""
        records = self.records()
        for experiment in self.order:
            for trial in experiment.study(self.out, records).trials():
                if trial.record is not None:
                    shutil.rmtree(trial.path, ignore_errors=True)

    def list(self) -> None:
        """Print every experiment with its finished and planned trials, and the order of those that come next."""
        records = self.records()
        hours = 0.0
        for experiment in self.order:
            trials = experiment.study(self.out, records).trials()
            done = sum(trial.finished for trial in trials)
            hours += experiment.minutes * (len(trials) - done) / 60
            print(
                f"{done:4} of {len(trials):4}  {experiment.minutes:5g} min each  {experiment.name}: {experiment.title}"
            )
        print(f"about {hours:.1f} core-hours are missing; next:")
        for _, (experiment, trial) in zip(range(10), missing(self.order, self.out, records), strict=False):
            print(f"  {experiment.name}: {trial}")


def parse_duration(text: str) -> float:
    """Return seconds of ``90s``, ``150m`` or ``2.5h``.

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    try:
        seconds = float(text[:-1]) * {"s": 1, "m": 60, "h": 3600}[text[-1:]]
        if not 0 < seconds < float("inf"):
            raise ValueError
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r}: write a duration such as 90s, 150m or 2h") from None
    return seconds


def main() -> int:
    """Read the command line and work."""
    parser = argparse.ArgumentParser(description="Take the next missing trials in the order of their worth.")
    parser.add_argument("--deadline", type=parse_duration, default=parse_duration("60m"), help="90s, 150m, 2h")
    parser.add_argument("--cores", type=int, default=1, help="trials side by side, one thread each")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "queue", help="folder of new records")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these experiments alone")
    parser.add_argument("--order", default=ORDER, metavar="MODULE:NAME", help="the experiments in their order")
    parser.add_argument("--committed", type=Path, default=COMMITTED, help="folder of records that are read only")
    parser.add_argument("--list", action="store_true", help="say what is finished and what comes next")
    arguments = parser.parse_args()
    if arguments.cores < 1:
        parser.error(f"--cores {arguments.cores}: give a number from 1")
    try:
        queue = Queue(arguments.order, arguments.out, arguments.cores, arguments.only, arguments.committed)
        if arguments.list:
            queue.list()
        else:
            queue.run(arguments.deadline)
    except EspalierError as error:
        print(f"queue: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
