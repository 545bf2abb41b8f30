"""What a benchmark measured, kept as lines of JSON from which ``make results`` makes the page of speeds."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from espalier.train.build import environment

Row = dict[str, float]


def summary(seconds: Sequence[float], mib: float | None = None) -> Row:
    """Return median, least and largest in milliseconds, how many there are, and the peak memory where it is known."""
    row = {
        "ms": round(statistics.median(seconds) * 1e3, 2),
        "least": round(min(seconds) * 1e3, 2),
        "most": round(max(seconds) * 1e3, 2),
        "n": len(seconds),
    }
    return row if mib is None else row | {"mib": round(mib, 1)}


def add_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--record FILE``."""
    parser.add_argument("--record", type=Path, metavar="FILE", help="keep the measurements as lines of JSON")


def record(file: Path | None, benchmark: str, case: str, rows: Mapping[str, Row], **setting: Any) -> None:
    """Write a line to ``file`` unless it is None, in the place of what the same benchmark, case and processor left.

    Args:
        file: lines of JSON, made if it does not exist.
        benchmark: the script's name without its suffix.
        case: what was timed.
        rows: what ``summary`` returns, by contender.
        setting: what else shapes the times, as the number of threads.
    """
    if file is None:
        return
    here = environment()
    instructions = torch.backends.cpu.get_cpu_capability()
    if Path("/proc/cpuinfo").exists() and " amx_tile" in Path("/proc/cpuinfo").read_text():
        instructions += ", AMX"
    line = {
        "benchmark": benchmark, "case": case, "processor": f"{here['processor']} ({instructions})",
        "torch": torch.__version__, "commit": (here["git_commit"] or "")[:7], "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "setting": setting, "rows": rows,
    }  # fmt: skip
    key = ("benchmark", "case", "processor")
    lines = [json.loads(text) for text in file.read_text("utf-8").splitlines()] if file.exists() else []
    lines = [old for old in lines if any(old[name] != line[name] for name in key)] + [line]
    file.parent.mkdir(parents=True, exist_ok=True)
    lines.sort(key=lambda entry: [str(entry[name]) for name in key])
    text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in lines)
    file.write_text(text, encoding="utf-8", newline="\n")
