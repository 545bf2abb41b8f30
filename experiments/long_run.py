"""A long run of the queue with random stops: is anything lost or repeated, do memory, handles and threads stay flat?

    python experiments/long_run.py --hours 12 --out /work/queue [--write docs/results/long-run.jsonl]

Starts ``experiments/queue.py`` and, at random moments, ends it or the trial that it runs with SIGTERM or SIGKILL, and
starts it again. Every twenty seconds it notes what each process holds. A session is one line of JSON; sessions of any
day and machine add up.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from espalier.study.records import read_records
from espalier.train.build import environment

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from experiments.scheduler import COMMITTED, ROOT

SAMPLE_SECONDS = 20.0
WARM_SECONDS = 60.0
"""Processor time after which everything is imported, read and compiled, on a machine however busy."""
KINDS = [(who, number) for who in ("queue", "trial") for number in (signal.SIGTERM, signal.SIGKILL)]
Held = tuple[float, float, int, int]  # seconds of processor time, MB, file handles, threads


def held(process: psutil.Process) -> Held:
    with process.oneshot():
        memory = process.memory_full_info().uss / 2**20
        return sum(process.cpu_times()[:2]), memory, process.num_fds(), process.num_threads()


def growth(samples: list[Held]) -> dict[str, float] | None:
    """Return what a process held at the end over what it held once warm; None if it did not live long enough."""
    warm = [sample for sample in samples if sample[0] > WARM_SECONDS]
    if len(warm) < 8:
        return None
    first, last = warm[: len(warm) // 4], warm[-(len(warm) // 4) :]
    more = [median(s[i] for s in last) - median(s[i] for s in first) for i in (1, 2, 3)]
    return {"minutes": warm[-1][0] / 60, "megabytes": more[0], "handles": more[1], "threads": more[2]}


def written(out: Path) -> Counter[tuple[str, str, float, int]]:
    """Return how often each trial has a record in ``out``: more than once would be work done twice."""
    files = sorted((out / "records").glob("*.jsonl"))
    return Counter((r.study, r.arm, r.lr, r.seed) for file in files for r in read_records(file))


def watch(
    out: Path, seconds: float, stops_an_hour: float, draw: random.Random, only: Sequence[str] = ()
) -> dict[str, Any]:
    """Run the queue, or these experiments of it, for some time with random stops, and return what happened."""
    before, stops, samples = written(out), Counter[str](), defaultdict[int, list[Held]](list)
    handed_over, complaints = 0, []
    started, end = time.time(), time.monotonic() + seconds
    log = out / "long_run.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    told = log.stat().st_size if log.exists() else 0  # by earlier sessions
    while (left := end - time.monotonic()) > SAMPLE_SECONDS:
        with log.open("a") as file:
            command = [sys.executable, str(ROOT / "experiments" / "queue.py"), "--out", str(out)]
            command += ["--deadline", f"{left:.0f}s", *(["--only", *only] if only else [])]
            queue = psutil.Popen(command, stdout=file, stderr=file)
        until = min(end, time.monotonic() + draw.expovariate(stops_an_hour / 3600))
        while time.monotonic() < until and queue.poll() is None:
            for process in [queue, *children(queue)]:
                try:
                    samples[process.pid].append(held(process))
                except psutil.Error:  # it ended meanwhile
                    continue
            time.sleep(min(SAMPLE_SECONDS, max(0.0, until - time.monotonic())))
        if queue.poll() is not None:
            if time.monotonic() < end - 2 * SAMPLE_SECONDS:
                complaints.append(f"the queue ended by itself with status {queue.returncode}")
                break
            continue
        who, number = draw.choice(KINDS)
        victims = [queue] if who == "queue" else children(queue)[:1]
        for victim in victims:
            victim.send_signal(number)
            stops[f"{who} {number.name}"] += 1
        if who == "trial":  # the queue takes the next one, and this one in its next life
            time.sleep(SAMPLE_SECONDS)
            queue.send_signal(signal.SIGTERM)
        psutil.wait_procs([queue, *children(queue)], timeout=60)
        handed_over += 1
    after = written(out)
    text = log.read_bytes()[told:].decode()
    complaints += complaints_in(text, stops)
    grown = [found for each in samples.values() if (found := growth(each)) is not None]
    return {
        "hours": (time.time() - started) / 3600,
        "date": time.strftime("%Y-%m-%d"),
        "processor": environment()["processor"],
        "python": platform.python_version(),
        "stops": dict(stops),
        "restarts": handed_over,
        "trials": sum(after.values()) - sum(before.values()),
        "repeated": sum(count - 1 for count in after.values()),
        "lost": len(before - after),
        "complaints": complaints[:5],
        "watched_processes": len(grown),
        **{f"most_more_{name}": max((each[name] for each in grown), default=0.0)
           for name in ("megabytes", "handles", "threads")},
        "longest_minutes": max((each["minutes"] for each in grown), default=0.0),
    }  # fmt: skip


def complaints_in(text: str, stops: Counter[str]) -> list[str]:
    """Return what a log complains of, less the trials that were killed here: the queue tells of those, too."""
    words = ("Traceback", "contradict", "failed with")
    found = [line for line in text.splitlines() if any(word in line for word in words)]
    for number in (signal.SIGKILL, signal.SIGTERM):
        ours = [line for line in found if f"failed with status -{number.value}:" in line]
        for line in ours[: stops[f"trial {number.name}"]]:
            found.remove(line)
    return found


def children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=12.0)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "queue")
    parser.add_argument("--stops-an-hour", type=float, default=6.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help="these experiments alone")
    parser.add_argument("--write", type=Path, help="the file of sessions, one line each")
    given = parser.parse_args()
    assert COMMITTED.is_dir(), f"no committed records in {COMMITTED}"
    session = watch(given.out, given.hours * 3600, given.stops_an_hour, random.Random(given.seed), given.only)
    line = json.dumps({k: round(v, 2) if isinstance(v, float) else v for k, v in session.items()})
    print(line)
    if given.write is not None:
        with given.write.open("a") as file:
            file.write(line + "\n")
    return 1 if session["repeated"] or session["lost"] or session["complaints"] else 0


if __name__ == "__main__":
    sys.exit(main())
