"""Memory that a program of ours frees: the next step takes it without asking the system again."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

resource = pytest.importorskip("resource", reason="page faults are counted by Unix alone")

STEPS = """
import resource, threading
import torch
{before}
def step():
    blocks = [torch.ones(12_000_000) for _ in range(4)]
    del blocks[1], blocks[0]
    return blocks
def steps():
    for _ in range(3):
        step()
    first = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        step()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - first) // 5)
{after}
"""
PAGES = 4 * 48_000_000 // 4096  # that a step writes; pages can be larger than that

COMMAND = """
import contextlib, io
from espalier.cli.main import main
with contextlib.redirect_stdout(io.StringIO()):
    assert main(["recipes"]) == 0
"""


def faults(before: str = "", after: str = "steps()", **environment: str) -> int:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    run = subprocess.run(
        [sys.executable, "-c", STEPS.format(before=before, after=after)],
        env={**clean, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


@pytest.fixture(scope="module")
def by_default() -> int:
    try:
        glibc = (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except ValueError:
        glibc = False
    count = faults() if glibc else 0
    if count < PAGES // 4:
        pytest.skip("this system's allocator keeps freed memory, or its pages are large")
    return count


@pytest.mark.parametrize("before", ["from espalier.heap import keep_freed_memory; keep_freed_memory()", COMMAND])
def test_a_program_of_ours_takes_what_it_freed(by_default: int, before: str) -> None:
    # A busy machine takes pages back from a program that waits: some thousands were seen.
    assert faults(before) < by_default // 3


def test_importing_the_library_changes_nothing_for_the_program_that_does(by_default: int) -> None:
    assert faults("import espalier, espalier.train, espalier.study") > by_default // 2


def test_the_users_own_settings_stay(by_default: int) -> None:
    keep = "from espalier.heap import keep_freed_memory; keep_freed_memory()"
    assert faults(keep, GLIBC_TUNABLES="glibc.malloc.arena_max=8") > by_default // 2
    assert faults(keep, MALLOC_ARENA_MAX="8") > by_default // 2


def test_a_thread_of_it_fares_no_worse(by_default: int) -> None:
    run = "thread = threading.Thread(target=steps); thread.start(); thread.join()"
    assert faults("from espalier.heap import keep_freed_memory; keep_freed_memory()", run) < 1.2 * by_default
