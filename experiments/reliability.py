"""What runs, studies and records survive: kill −9 in any phase, damage, full and read-only disks, hostile values.

    python experiments/reliability.py --short                                         (a minute; nothing is written)
    python experiments/reliability.py --kills 200 --write docs/results/reliability.md [--minutes 60]

Runs are small (digits, a two-block ViT, averaged weights) and forked from one process that has imported everything, on
one thread; two ranks of DDP are two forks. Every campaign counts what it tried and what was lost, and the command ends
with status 1 if anything was: a resumed result that is not that of an unbroken run to the bit, a traceback, a wrong
number. Sizes of disks need root (a tmpfs); without it that campaign is left out, and the page says so.
"""

from __future__ import annotations

import argparse
import errno
import math
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch

from espalier.errors import require
from espalier.recipes import Recipe
from espalier.recipes.validation import resolve_recipe
from espalier.train import RunInterrupted, train
from espalier.train.build import environment

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from experiments.kills import LOST, REFUSED, RUN, do_study, ended, kills, run_outcome, start, study_outcome, train_run
from experiments.readers import TARGETS, hunt, samples

T = TypeVar("T")
BY_HAND = "## What the tests try"


@dataclass
class Found:
    """The counts of one campaign."""

    name: str
    how: str
    tried: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)

    def add(self, status: int, what: str, done: str) -> None:
        """Count one child by its exit status."""
        self.tried += 1
        name = {0: done, REFUSED: "refused in one line", -signal.SIGALRM: "still running after 20 s"}.get(
            status, "lost"
        )
        self.outcomes[name] += 1
        if name == "lost":
            self.lost.append(f"{self.name}: {what}: status {status}")


def flip(content: bytes, draw: random.Random) -> bytes:
    found = bytearray(content)
    for place in (draw.randrange(len(found)) for _ in range(min(64, len(found)))):
        found[place] ^= 1 << draw.randrange(8)
    return bytes(found)


def one_bit(content: bytes, draw: random.Random) -> bytes:
    found = bytearray(content)
    found[draw.randrange(len(found))] ^= 1 << draw.randrange(8)
    return bytes(found)


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "truncated": lambda content, draw: content[: draw.randrange(max(1, len(content)))],
    "flipped": flip,
    "one bit flipped": one_bit,
    "emptied": lambda content, draw: b"",
    "replaced": lambda content, draw: draw.randbytes(len(content)),
}


def within(todo: Sequence[T], draw: random.Random, most: int, ends: float) -> Iterator[T]:
    """Yield at most ``most`` of what there is to do, in random order, until ``time.monotonic()`` is at ``ends``."""
    for each in draw.sample(todo, min(most, len(todo))):
        if time.monotonic() >= ends:
            return
        yield each


def damage(folder: Path, draw: random.Random, most: int, ends: float) -> Found:
    """Damage every file of a finished run, a stopped run and a finished study, go on, and compare."""
    found = Found("damage", "every file of a finished run, a stopped run and a study with its records, in five ways")
    cases: list[tuple[str, Callable[[Path], None], Callable[[Path], Any]]] = [
        ("finished", train_run, run_outcome), ("stopped", train_run, run_outcome), ("study", do_study, study_outcome),
    ]  # fmt: skip
    todo = []
    for name, work, outcome in cases:
        (folder / name).mkdir(parents=True)
        if name == "stopped":
            ended(start(lambda: stop_in_last_epoch(folder / "stopped")))
            assert (folder / "stopped/run/checkpoint.old").is_dir()
            expected = outcome(folder / "finished")
        else:
            assert ended(start(lambda work=work, name=name: work(folder / name))) == 0
            expected = outcome(folder / name)
        for path in sorted(path for path in (folder / name).rglob("*") if path.is_file() and path.stat().st_size):
            todo += [(name, work, outcome, expected, path.relative_to(folder / name), how) for how in DAMAGES]
    for name, work, outcome, expected, file, how in within(todo, draw, most, ends):
        copy = folder / "copy"
        shutil.copytree(folder / name, copy)
        content = (copy / file).read_bytes()
        (copy / file).write_bytes(DAMAGES[how](content, draw))

        def resume(work: Any = work, outcome: Any = outcome, expected: Any = expected, copy: Path = copy) -> None:
            work(copy)
            if outcome(copy) != expected:
                raise AssertionError("a wrong number")

        found.add(ended(start(resume)), f"{name}/{file} {how}", "same numbers")
        shutil.rmtree(copy)
    return found


def stop_in_last_epoch(folder: Path) -> None:
    from espalier.train import loop

    step, done = loop._step, 0

    def counted(*args: Any) -> Any:
        nonlocal done
        done += 1
        if done == 11:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    loop._step = counted
    with suppress(RunInterrupted):
        train_run(folder)


@contextmanager
def failing_writes(folder: Path, first: int, code: int, count: mmap.mmap) -> Iterator[None]:
    """Let every change below a folder fail from the ``first`` one on, as on a disk that is full or read-only."""
    changes = {"os.rename", "os.mkdir", "os.rmdir", "os.remove"}

    def hook(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not (writes or (event in changes and code == errno.EROFS) or event in ("os.rename", "os.mkdir")):
            return
        if str(folder) in os.fsdecode(args[0] if isinstance(args[0], str | bytes | os.PathLike) else ""):
            number = int.from_bytes(count[:8], "little") + 1
            count[:8] = number.to_bytes(8, "little")
            if number >= first:
                raise OSError(code, os.strerror(code), str(args[0]))

    sys.addaudithook(hook)  # for the rest of this process, which is a child
    yield


def failing_disks(folder: Path, draw: random.Random, most: int, ends: float) -> Found:
    """Make the k-th write and all after it fail, for every k; then go on with a disk that works."""
    found = Found("failing writes", "the disk full or read-only from the k-th write of a run on; then resumed")
    folder.mkdir()
    count = mmap.mmap(-1, 8)

    def work(place: Path, first: int, code: int) -> None:
        with failing_writes(place, first, code, count):
            train_run(place)

    (folder / "whole").mkdir()
    assert ended(start(lambda: work(folder / "whole", 10**9, errno.ENOSPC))) == 0
    writes, expected = int.from_bytes(count[:8], "little"), run_outcome(folder / "whole")
    todo = [(first, code) for first in range(1, writes + 1) for code in (errno.ENOSPC, errno.EROFS)]
    for first, code in within(todo, draw, most, ends):
        place = folder / "place"
        place.mkdir()
        count[:8] = bytes(8)
        status = ended(start(lambda first=first, code=code, place=place: work(place, first, code)))
        whole = ended(start(lambda place=place: train_run(place)))
        same = whole == 0 and run_outcome(place) == expected
        # What fails while leftovers are deleted changes nothing: the run may end well.
        found.add(
            status if same else LOST, f"write {first} of {writes}, {errno.errorcode[code]}", "finished all the same"
        )
        shutil.rmtree(place)
    found.how += f" ({writes} writes a run)"
    return found


def small_disks(folder: Path, draw: random.Random, most: int, ends: float) -> Found:
    """Run on disks that are really full, of many sizes; then on the same disk, made larger."""
    found = Found(
        "small disks", "a run on a tmpfs of k pages, for every k that is too few; then resumed on a larger one"
    )
    if os.geteuid() != 0 or shutil.which("mount") is None:
        found.how += " (left out: needs root)"
        return found
    (folder / "whole").mkdir(parents=True)
    train_run(folder / "whole")
    expected = run_outcome(folder / "whole")
    disk = folder / "disk"
    disk.mkdir()
    for kib in within(range(4, 400, 4), draw, most, ends):
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(disk)], check=True)
        try:
            status = ended(start(lambda: train_run(disk)))
            subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
            same = ended(start(lambda: train_run(disk))) == 0 and run_outcome(disk) == expected
        finally:
            subprocess.run(["umount", str(disk)], check=True)
        found.add(status if same else LOST, f"{kib} KiB", "had room")
    return found


VALUES: Sequence[Any] = (
    float("nan"), float("inf"), -float("inf"), -1, 0, 1, 2.5, 1e-300, 1e300, 10**30, 2**62, 10**17, True, None, "",
    "two", "nan", "../x", "\0",
    "x" * 5000, [], [1, 2, 3], (1.0, 1e300), (0.0, 0.0), {}, {"a": 1}, {"num_classes": -1}, {"embed_dim": 0},
    {"depth": "x"},    {"train_limit": 1}, {"": None}, {"dim": float("nan")}, object(), b"bytes",
)  # fmt: skip


def hostile_values(folder: Path, draw: random.Random, most: int, ends: float) -> Found:
    """Give every field of a recipe every hostile value: it is refused in one line, or it runs."""
    found = Found("hostile values", f"every field of a recipe with {len(VALUES)} hostile values")
    folder.mkdir()
    todo = [(each.name, value) for each in fields(Recipe) for value in VALUES]
    for name, value in within(todo, draw, most, ends):
        recipe = replace(RUN, **{name: value})

        def work(recipe: Recipe = recipe) -> None:
            signal.alarm(20)
            train(replace(resolve_recipe(recipe), threads=1), folder / "run", progress=False)

        found.add(ended(start(work)), f"{name}={value!r:.60}", "ran")
        shutil.rmtree(folder / "run", ignore_errors=True)
        for left in folder.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    return found


def damaged_files(folder: Path, draw: random.Random, most: int, ends: float) -> Found:
    """Give every reader of files from elsewhere a damaged sample, many times."""
    found = Found("readers", f"damaged samples for {len(TARGETS)} readers of files that come from elsewhere")
    folder.mkdir()
    for left, name in zip(range(len(TARGETS), 0, -1), TARGETS, strict=True):
        now = time.monotonic()
        share = now + max(0.0, ends - now) / left
        tried, broken = hunt(name, islice(samples(name, draw, share), most), folder / "reader")
        found.tried += tried
        found.outcomes["read, or refused in one line"] += tried - len(broken)
        found.lost += broken
    return found


def page(tried: Counter[str], campaigns: Sequence[Found], seconds: float, command: str) -> str:
    """Return the page of results."""
    lines = [
        "# What runs survive",
        "",
        f"Written by `{command}` in {seconds / 60:.0f} minutes on one core ({environment()['processor']}, torch "
        f"{torch.__version__}, {date.today()}). A run is three epochs of a small ViT on digits with averaged weights; "
        "a study is four trials with their records and page; "
        "ranks are two processes of DDP. Lost means: a resumed result that differs in one bit from an unbroken run, a "
        "traceback, or a wrong number.",
        "",
        "## Kill −9",
        "",
        "| what was killed: in which phase | kills |",
        "|---|---|",
        *[f"| {name} | {count} |" for name, count in sorted(tried.items())],
        f"| **all** | {sum(tried.values())} |",
        "",
    ]
    for each in campaigns:
        outcomes = ", ".join(f"{name} {count}" for name, count in sorted(each.outcomes.items())) or "–"
        lines += [f"## {each.name.capitalize()}", "", f"{each.how}. Tried: {each.tried}; {outcomes}.", ""]
    lost = [line for each in campaigns for line in each.lost]
    lines += ["## Lost", "", *([f"- {line}" for line in lost] or ["Nothing."]), ""]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a minute: a few of each")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--most", type=int, default=10**6, help="of each other campaign")
    parser.add_argument("--minutes", type=float, default=math.inf, help="half of them for the kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="the page of results")
    given = parser.parse_args()
    torch.set_num_threads(1)
    require("lightning_fabric", "train")
    number, most = (12, 15) if given.short else (given.kills, given.most)
    started, draw = time.monotonic(), random.Random(given.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tried, lost = kills(folder / "kills", number, given.seed, started + 30 * given.minutes)
        campaigns = [Found("kill -9", "", lost=lost)]
        print(f"kill -9: {sum(tried.values())} tried, {len(lost)} lost", flush=True)
        todo: list[tuple[Callable[[Path, random.Random, int, float], Found], int]] = [
            (damage, most), (failing_disks, most), (small_disks, 90), (hostile_values, most), (damaged_files, 1000),
        ]  # fmt: skip
        for left, (campaign, limit) in zip(range(len(todo), 0, -1), todo, strict=True):
            now = time.monotonic()
            ends = now + (started + 60 * given.minutes - now) / left
            campaigns.append(campaign(folder / campaign.__name__, draw, min(most, limit), ends))
            print(f"{campaigns[-1].name}: {campaigns[-1].tried} tried, {dict(campaigns[-1].outcomes)}", flush=True)
    for line in (line for each in campaigns for line in each.lost):
        print("LOST", line)
    if given.write is not None:
        command = f"python experiments/reliability.py --kills {given.kills} --seed {given.seed} --write {given.write}"
        text = page(tried, campaigns[1:], time.monotonic() - started, command)
        # What the page says of the test suite is written by hand, and stays.
        kept = given.write.read_text().partition(BY_HAND)[1:] if given.write.exists() else ()
        given.write.write_text("\n".join([text, "".join(kept)]) if kept else text)
    return 1 if any(each.lost for each in campaigns) else 0


if __name__ == "__main__":
    raise SystemExit(main())
