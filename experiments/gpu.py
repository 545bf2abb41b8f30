"""One command for a GPU: tests, speed tables and trainings, in order of worth, for as long as time lasts.

    python experiments/gpu.py --deadline 25m --out DIR [--data DIR] [--only STEP …] [--parallel 3] [--smallest]

``make gpu`` runs it. Steps: tests (those marked ``gpu``), orthogonal, scans, convmixer (speed tables), trainings. Each
has a share of the time that is left; one that fails is recorded and the next begins. ``DIR`` holds at most eight small
files, written after every step and added to by a second call: ``tables.jsonl`` and ``results.md`` (the same numbers),
``records.jsonl`` (one line a finished training), ``curves.jsonl`` (its epochs), ``tests.txt`` and ``environment.json``.

Without CUDA the smallest form runs on the CPU: it shows that everything runs, and its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from espalier.files import write_json
from espalier.train import environment
from experiments.on_gpu.results import Results
from experiments.on_gpu.speed_convmixer import convmixer_tables
from experiments.on_gpu.speed_orthogonal import orthogonal_tables
from experiments.on_gpu.speed_scans import scan_tables
from experiments.on_gpu.timing import Clock
from experiments.on_gpu.trainings import train_all

ROOT = Path(__file__).parents[1]


@dataclass
class Job:
    """What every step is given."""

    results: Results
    clock: Clock
    device: str
    smallest: bool
    data: Path | None
    parallel: int
    work: Path


def run_tests(job: Job) -> None:
    """Run the tests marked ``gpu``; without CUDA a few of them on the CPU, to see that they run."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu", "-p", "no:cacheprovider", "--tb=short"]
    # A warning of a library's own start-up on another machine is no failure of ours.
    command += ["-W", "default", "--show-capture=no"]
    command += ["-k", "float32 and (maxmin or linear-wide)"] if job.smallest else ["-n", "8", "--dist", "worksteal"]
    settings = {**os.environ, "ESPALIER_TEST_DEVICE": job.device, "OMP_NUM_THREADS": "2"}
    started = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=max(job.clock.left(), 5)
        )
        output, status = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired as error:
        said = error.stdout or ""
        said = said.decode() if isinstance(said, bytes) else said
        output, status = f"{said}\nstopped: the step's time was over", -1
    (job.results.out / "tests.txt").write_text(output[-200_000:])
    last = output.strip().splitlines()[-1] if output.strip() else "no output"
    job.results.add("tests", outcome=last, exit_status=status, seconds=round(time.monotonic() - started, 1))
    if status:
        raise RuntimeError(f"the tests did not pass: {last}")


# Name, share of the time left when it begins, and what it does.
STEPS: dict[str, tuple[float, Callable[[Job], None]]] = {
    "tests": (0.4, run_tests),
    "orthogonal": (0.25, orthogonal_tables),
    "scans": (0.3, scan_tables),
    "convmixer": (0.4, convmixer_tables),
    "trainings": (1.0, train_all),
}


def run_step(name: str, job: Job, deadline: float) -> bool:
    """Run one step within its share of the time, write what it gave, and return whether it went well."""
    share, function = STEPS[name]
    started = time.monotonic()
    job.clock = Clock(started + share * (deadline - started))
    print(f"== {name}: {job.clock.left():.0f} s", flush=True)
    try:
        function(job)
        problem = ""
    except Exception:
        problem = "\n".join(traceback.format_exc().splitlines()[-6:])
        print(problem, flush=True)
    job.results.add("steps", step=name, seconds=round(time.monotonic() - started, 1), problem=problem)
    job.results.write()
    return not problem


def seconds_of(text: str) -> float:
    """Return seconds for ``90``, ``90s``, ``25m`` or ``1h``."""
    unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1:], 0)
    return float(text[:-1]) * unit if unit else float(text)


def main() -> None:
    """Run the steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deadline", type=seconds_of, default="25m", help="when to stop, from now: 90s, 25m, 1h")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--data", type=Path, help="folder that holds cifar10/ (default: ESPALIER_DATA)")
    parser.add_argument("--only", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--parallel", type=int, default=1, help="trainings that share the GPU at a time")
    parser.add_argument("--smallest", action="store_true", help="smoke test; its numbers mean nothing")
    parser.add_argument("--commit", help="commit to note where the source is a copy without git")
    parser.add_argument("--work", type=Path, help="folder of the run folders (default: OUT-runs, beside OUT)")
    options = parser.parse_args()
    deadline = time.monotonic() + options.deadline
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    where = environment()
    commit = where["git_commit"] = where["git_commit"] or options.commit
    write_json(out / "environment.json", where)
    work = options.work or out.with_name(f"{out.name}-runs")
    smallest = options.smallest or device == "cpu"
    job = Job(Results(out, commit), Clock(deadline), device, smallest, options.data, options.parallel, work.resolve())
    well = [run_step(name, job, deadline) for name in STEPS if name in options.only]
    print((out / "results.md").read_text())
    sys.exit(0 if all(well) else 1)


if __name__ == "__main__":
    main()
