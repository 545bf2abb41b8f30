"""The page of the speed tables that ``make gpu`` left behind (docs/results/gpu.md)."""

from __future__ import annotations

import json
from typing import Any

from experiments.scheduler import COMMITTED

TABLES = COMMITTED.parent / "gpu-h100.jsonl"
_TITLES = {
    "orthogonal": "Orthogonal layers, one training step",
    "scans": "Scans: one block, forward and backward, float32",
    "ssd alone": "The Mamba-2 recurrence alone",
    "convmixer": "ConvMixer",
    "kernels": "What the Triton kernels take of an H100: compiled for sm_90 without one; bytes, a thread or a program",
}
_HIDDEN = {"table", "least_ms", "difference"}
_HEAD = """\
<!-- Made from docs/results/gpu-h100.jsonl by `make results`: do not edit. -->

# Speed on a GPU

**Finding: on an H100 our scans are ahead of the peers in plain torch or level with them, our orthogonal layers are
not.** With the Triton kernels of today a block of Mamba-1 is {mamba1:.1f} times faster than with mamba.py's parallel
scan at 8 × 1024 and takes {memory:.0f} times less memory (before them it was 8 times slower); at 32 × 1024 it is
{larger:.1f} times faster. Mamba-2 is {mamba2:.1f} times faster than the minimal listing at 8 × 16384 and level with
it at 8 × 4096, where it was 8 times slower. Where `mamba_ssm` is installed its kernels run; they could not be had
here. Training a Cayley convolution (shape A) took {cayley:.1f} times a step of AOC: a profile showed 3 of its
milliseconds on the card and the rest on the host, in calls for parts of the frequencies; all go together since, which
is not timed yet. `torch.compile` trains a ConvMixer {compiled:.1f} times faster than eager.

One NVIDIA H100 80GB, torch 2.11.0+cu130, 2026-11-26, medians by CUDA events (n in the table), by `make gpu`: the
scans at commit f1746ca, while other cores of the machine trained and, during the first rows, a small test used the
card too; the rest at commit 3fbf1ce, nothing else on the card. `faster` counts from the first row of a group,
`ours_faster` is the time of that way over ours. Of 171 tests marked `gpu`, 160 passed at commit 343547b; eight ended
in a fixture that asked for a function that had moved, two found that torch 2.11's compiler takes functions for
constants (gradients of zero, mended in how they return), and one could not trace a table of sizes (rewritten). The
mended ones did not run on a card again.
"""


def gpu_page() -> str:
    """Return the page."""
    rows: list[dict[str, Any]] = [json.loads(line) for line in TABLES.read_text(encoding="utf-8").splitlines()]

    def one(key: str, table: str, **wanted: Any) -> float:
        [row] = [r for r in rows if r["table"] == table and all(r.get(k) == v for k, v in wanted.items())]
        return float(row[key])

    def scan(key: str, way: str, family: str, length: int) -> float:
        return one(key, "scans", way=way, family=family, length=length, batch=8)

    cayley = [one("median_ms", "orthogonal", shape="A", phase="train", way=way) for way in ("espalier", "AOC")]
    small, large = (scan("peak_mib", way, "mamba1", 1024) for way in ("espalier", "mamba.py's parallel scan"))
    compiled = one("faster", "convmixer", phase="train", way="ours, contiguous, compiled")
    text = [
        _HEAD.format(
            cayley=cayley[0] / cayley[1],
            mamba1=scan("ours_faster", "mamba.py's parallel scan", "mamba1", 1024),
            larger=one("ours_faster", "scans", way="mamba.py's parallel scan", family="mamba1", length=1024, batch=32),
            mamba2=scan("ours_faster", "minimal listing, chunk 64", "mamba2", 16384),
            memory=large / small,
            compiled=compiled,
        )
    ]  # fmt: skip
    for table, title in _TITLES.items():
        mine = [{k: v for k, v in row.items() if k not in _HIDDEN} for row in rows if row["table"] == table]
        columns = list(dict.fromkeys(key for row in mine for key in row))
        text += [f"\n## {title}\n", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
        text += ["| " + " | ".join(_cell(row.get(key)) for key in columns) + " |" for row in mine]
    return "\n".join(text) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").partition("\n")[0]
