"""Every fault of the corpus is caught by the right check at the right layer, and its healthy twin is not."""

from __future__ import annotations

import re
import time

import pytest
import torch

import espalier
from doctor.corpus import direction, memory, state_space, training, weights  # noqa: F401  (they fill CASES)
from doctor.corpus.case import CASES, Case


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_fault_is_caught(case: Case) -> None:
    torch.manual_seed(0)
    arguments = case.build(True)
    start = time.monotonic()
    diagnosis = espalier.diagnose(**arguments)
    assert time.monotonic() - start < 5
    hits = [f for f in diagnosis.findings if f.check == case.check and f.layer == case.layer]
    assert [f.severity for f in hits] == [case.severity], f"{case.thread}\n{diagnosis}"
    assert diagnosis.exit_status() == (case.severity == "error" or bool(diagnosis.errors))
    assert case.layer in str(diagnosis) or re.search(r"\*", str(diagnosis))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_healthy_twin_is_not(case: Case) -> None:
    torch.manual_seed(0)
    diagnosis = espalier.diagnose(**case.build(False))
    bad = [f for f in diagnosis.findings if f.severity != "note" or f.check == case.check]
    assert not bad, f"{case.thread}\n{diagnosis}"


def test_corpus_is_as_large_as_promised() -> None:
    assert len(CASES) >= 40
    assert len({case.name for case in CASES}) == len(CASES)
    threads = [case.thread for case in CASES if case.thread]
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+#\d+", thread) for thread in threads)
    assert len(set(threads)) >= 25
