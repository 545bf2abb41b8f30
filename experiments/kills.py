"""Kill −9 at random moments of every phase of a run, a study and two ranks of DDP; see ``reliability``."""

from __future__ import annotations

import json
import mmap
import os
import random
import shutil
import signal
import socket
import struct
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from espalier import data
from espalier.errors import EspalierError
from espalier.recipes import get_recipe
from espalier.report import page as report_page
from espalier.report import write_report
from espalier.study import launch, launcher, load_study, plan_study, records, summarise
from espalier.train import load_run, loop, train

PHASES = ("start", "data", "step", "evaluation", "checkpoint", "rename", "finish", "queue", "records", "report")
RUN = replace(
    get_recipe("digits_vit"), data_args={"train_limit": 64, "test_limit": 40}, batch_size=16, epochs=3, eval_every=2,
    model_args={"patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 3}, ema_decay=0.9, warmup_epochs=0.0,
    threads=1,
)  # fmt: skip
REFUSED, LOST = 3, 4  # exit statuses of a child
Kill = tuple[str, int, float]
"""A phase, which of its entries, and the seconds after it."""
TIMED = ("seconds", "step_seconds")


class Watch:
    """Memory shared with a child: the phase that it is in, how often it was in each, and for how long."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, 8 * (1 + 2 * len(PHASES)))

    def _get(self, place: int) -> float:
        return float(struct.unpack_from("d", self._shared, 8 * place)[0])

    def _set(self, place: int, value: float) -> None:
        struct.pack_into("d", self._shared, 8 * place, value)

    @property
    def phase(self) -> str:
        return PHASES[int(self._get(0))]

    def entries(self, phase: str) -> int:
        return int(self._get(1 + 2 * PHASES.index(phase)))

    def seconds(self, phase: str) -> float:
        return self._get(2 + 2 * PHASES.index(phase)) / max(1, self.entries(phase))

    def around(self, phase: str, function: Callable[..., Any], kill: Kill | None) -> Callable[..., Any]:
        """Return ``function`` with its phase noted; at entry number ``kill[1]`` of a phase a killer is started."""
        index = PHASES.index(phase)

        def call(*args: Any, **kwargs: Any) -> Any:
            before = self._get(0)
            self._set(0, index)
            self._set(1 + 2 * index, self.entries(phase) + 1)
            if kill is not None and kill[:2] == (phase, self.entries(phase)):
                kill_after(kill[2])
            started = time.perf_counter()
            result = function(*args, **kwargs)
            self._set(2 + 2 * index, self._get(2 + 2 * index) + time.perf_counter() - started)
            self._set(0, before)
            return result

        return call

    def install(self, kill: Kill | None = None) -> None:
        """Watch this process from now on."""
        places: list[tuple[str, Any, str]] = [
            ("data", data, "build_source"), ("step", loop, "_step"), ("evaluation", loop, "evaluate"),
            ("checkpoint", loop, "save_checkpoint"), ("finish", loop, "_finish"), ("rename", os, "replace"),
            ("rename", os, "rename"), ("queue", launcher, "drain"), ("records", records, "add_records"),
            ("report", report_page, "write_bytes"),
        ]  # fmt: skip
        for phase, module, name in places:
            setattr(module, name, self.around(phase, getattr(module, name), kill))


def kill_after(seconds: float) -> None:
    """Have this process killed (−9) from outside, after a while."""
    victim = os.getpid()
    if os.fork() == 0:
        time.sleep(seconds)
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
        os._exit(0)


def start(work: Callable[[], None], environment: dict[str, str] | None = None) -> int:
    """Fork a child that does ``work`` and leaves with status 0, REFUSED (one line) or LOST (anything else)."""
    child = os.fork()
    if child:
        return child
    os.environ.update(environment or {})
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # killers are nobody's business
    try:
        with open(os.devnull, "w") as nowhere, warnings.catch_warnings():
            sys.stdout = nowhere
            warnings.simplefilter("ignore")
            work()
        os._exit(0)
    except EspalierError as error:
        if "\n" not in str(error):
            os._exit(REFUSED)
        traceback.print_exc()
    except BaseException:
        traceback.print_exc()
    os._exit(LOST)


def ended(child: int) -> int:
    """Wait for a child and return its status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# What is done, and what must come out of it whatever happens on the way.


def untimed(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in TIMED}


def run_outcome(folder: Path) -> Any:
    found = load_run(folder / "run")
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    weights = {name: tensor.tolist() for name, tensor in found.model().state_dict().items()}
    return [untimed(row) for row in found.rows], untimed(found.result or {}), weights, names


def train_run(folder: Path) -> None:
    train(RUN, folder / "run", progress=False)


def do_study(folder: Path) -> None:
    study = plan_study(replace(RUN, epochs=1), ["default", "structured"], [1e-3], [0, 1], folder / "study")
    launch(study, workers=1)
    records.add_records(load_study(study.path).outcomes().values(), folder / "records.jsonl")
    write_report([study.path], folder / "page.html")


def study_outcome(folder: Path) -> Any:
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    kept = [{key: line[key] for key in ("arm", "seed", "digest", "score", "steps")} for line in lines]
    assert len(kept) == 4
    assert (folder / "page.html").read_text().rstrip().endswith("</html>")
    return kept, [(arm.arm, arm.finished, arm.score) for arm in summarise(folder / "study").arms]


def ranks(folder: Path, watches: list[Watch], kill: Kill | None, victim: int) -> list[int]:
    """Train on two ranks, of which one may be killed; the other is killed when it is the only one left."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank, watch in enumerate(watches):
        sizes = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0}
        shared = {"TORCHELASTIC_RUN_ID": "forks", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

        def work(watch: Watch = watch, rank: int = rank) -> None:
            watch.install(kill if rank == victim else None)
            if kill is not None:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what the survivor says of its dead peer
            train_run(folder)

        children.append(start(work, {name: str(value) for name, value in sizes.items()} | shared))
    statuses = dict.fromkeys(children, 0)
    for _ in children:
        child, status = os.wait()
        while child not in statuses:
            child, status = os.wait()
        statuses[child] = os.waitstatus_to_exitcode(status)
        if statuses[child]:
            for other in children:
                with suppress(ProcessLookupError):
                    os.kill(other, signal.SIGKILL)
    return list(statuses.values())


def kills(folder: Path, count: int, seed: int, ends: float) -> tuple[Counter[str], list[str]]:
    """Kill runs, studies and ranks at random moments of every phase, go on, and compare with what was never killed.

    It stops after ``count`` kills, or when ``time.monotonic()`` is at ``ends``.
    """
    draw = random.Random(seed)
    tried: Counter[str] = Counter()
    lost: list[str] = []
    jobs: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any], int]] = {
        "run": (train_run, run_outcome, 1), "study": (do_study, study_outcome, 1), "ranks": (train_run, run_outcome, 2),
    }  # fmt: skip
    expected, seen = {}, {}
    for name, (work, outcome, processes) in jobs.items():
        watches = [Watch() for _ in range(processes)]
        (folder / name).mkdir(parents=True)
        assert attempt(work, folder / name, watches, None, 0), f"{name} does not even run unbroken"
        expected[name], seen[name] = outcome(folder / name), watches[0]
    while sum(tried.values()) < count and time.monotonic() < ends:
        name = ("run", "study", "run", "ranks")[sum(tried.values()) % 4]
        work, outcome, processes = jobs[name]
        # The phase with the fewest kills so far among those that this job has.
        phase = min((p for p in PHASES if seen[name].entries(p)), key=lambda p: (tried[f"{name}: {p}"], draw.random()))
        kill = (phase, draw.randint(1, seen[name].entries(phase)), draw.random() * seen[name].seconds(phase))
        place = folder / f"{name}-{sum(tried.values())}"
        place.mkdir()
        watches = [Watch() for _ in range(processes)]
        victim = draw.randrange(processes)
        if attempt(work, place, watches, kill, victim):
            tried[f"{name}: after the end"] += 1
        else:
            tried[f"{name}: {watches[victim].phase}"] += 1
        whole = attempt(work, place, [Watch() for _ in range(processes)], None, 0)
        if not whole or outcome(place) != expected[name]:
            lost.append(f"{name} killed in {kill}: {'another result' if whole else 'does not go on'}")
        shutil.rmtree(place)
    return tried, lost


def attempt(work: Callable[[Path], None], folder: Path, watches: list[Watch], kill: Kill | None, victim: int) -> bool:
    """Do the work in children, perhaps killing one; return whether all of them came to the end."""
    if len(watches) == 2:
        return not any(ranks(folder, watches, kill, victim))

    def watched() -> None:
        watches[0].install(kill)
        work(folder)

    return ended(start(watched)) == 0
