"""The page of speeds (docs/results/speed.md) from what the benchmarks recorded, a table for each processor."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments.scheduler import COMMITTED

TIMINGS = COMMITTED / "speed" / "timings.jsonl"
Line = Mapping[str, Any]

_HEAD = """\
<!-- Made from docs/results/records/speed by `make results`: do not edit. -->

# Speed

{finding}

Times of every contender of a row were taken in one run, in turns, on a virtual machine with two cores that little else
used. They drift from run to run; the ratios of medians are the result, and the ratios of least times stand beside them.
"""


class Target(NamedTuple):
    """How many times the best rival's time ours must go into: cases that contain every one of ``words``."""

    benchmark: str
    words: tuple[str, ...]
    ours: tuple[str, ...]
    rivals: tuple[str, ...]
    bar: float


class Section(NamedTuple):
    """One benchmark: its heading, what it asks, and the command; ``ours`` first in its tables."""

    benchmark: str
    title: str
    text: str
    command: str


SECTIONS = (
    Section(
        "cayley",
        "Cayley convolutions",
        '"original" is the published formula written plainly (FFT, `torch.linalg.inv`, permutes); AOC and SOC are\n'
        "orthogonium's. The original's stride-2 layer really has one tap.",
        "python benchmarks/cayley.py --repeats 9 --record FILE",
    ),
    Section(
        "scans",
        "Scans",
        "One block of width 256, expand 2, forward and backward; Mamba-1 has state 16, Mamba-2 state 64, heads of 64.\n"
        "Peak memory is the growth of the resident set in a process of its own.",
        "python benchmarks/scans.py --rounds 5 --record FILE",
    ),
    Section(
        "convmixer",
        "ConvMixer",
        "Ours beside the paper's plain definition and timm's class, in both layouts, every way in a process of its\n"
        "own, as a user has it: what one pays for fresh pages at every call shows. Ours takes the memory that its\n"
        "earlier results left.",
        "python benchmarks/convmixer.py --threads 1 --rounds 7 --shapes 256/8-k5-p2 256/8-k9-p2 --record FILE",
    ),
    Section(
        "lipschitz_nets",
        "Certified nets",
        "Forward, backward and Adam for the nets of two recipes on images of 28 × 28, with our convolutions and with\n"
        "orthogonium's in the same net. Both nets have 480,000 parameters.",
        "python benchmarks/lipschitz_nets.py --record FILE",
    ),
    Section(
        "structure_vit_large",
        "Writing structure into a ViT-L",
        "`structure_` with its verification against one full SVD a head and layer, timed on sixteen and multiplied up.",
        "python benchmarks/structure_vit_large.py --record FILE",
    ),
    Section(
        "structure_7b",
        "Writing structure into a stack of 7B",
        "Two layers of each kind are timed and multiplied up; the memory is the process's peak.",
        "python benchmarks/structure_7b.py --threads 2 --record FILE",
    ),
    Section(
        "loader",
        "Streamed images",
        "What an image costs the streaming loader (reading, decoding, cropping, resizing in workers), and the models\n"
        "that it feeds in a training step; the memory is the largest of this process and its workers together. Other\n"
        "programs shared both cores while the loader ran: its time is an upper bound.",
        "python benchmarks/loader.py --folder DIR --workers 1 --steps 1560 --record FILE",
    ),
    Section(
        "heap",
        "Memory that a training step frees",
        "A training step in a process that keeps freed memory for the next one, as `espalier` and the workers of a\n"
        "study do with glibc's allocator, beside one that gives it back to the system.",
        "python benchmarks/heap.py --rounds 5 --record FILE",
    ),
    Section(
        "doctor",
        "The doctor",
        "Static checks on one core; the bar is one second for 100 million parameters.",
        "python benchmarks/doctor.py --record FILE",
    ),
)

_ORIGINAL, _FREE, _TIMM = ("original",), ("Conv2d, circular",), ("timm, contiguous", "timm, channels_last")
_OURS = ("ours, contiguous", "ours, channels_last")
_PEERS = ("transformers, parallel scan", "mamba.py's parallel scan")
_CHUNKED = ("transformers, chunk 256 (default)", "transformers, chunk 64", "minimal listing, chunk 64")
TARGETS = (
    *(
        Target("cayley", (f"{shape}, ", kind), (name,), _ORIGINAL, bar)
        for shape, name, training, evaluation in (
            ("A", "espalier", 6, 10),
            ("B", "espalier", 6, 15),
            ("C", "espalier", 12, 35),
            ("S", "espalier, one tap", 24, 30),
        )
        for kind, bar in (("training step", training), ("evaluation", evaluation))
    ),
    Target("cayley", ("S, ", "training step"), ("espalier, nine taps",), _ORIGINAL, 8),
    *(
        Target("cayley", (f"{shape}, ", kind), (name,), _FREE, 1)
        for shape, name in (("A", "espalier"), ("B", "espalier"), ("C", "espalier"), ("S", "espalier, one tap"))
        for kind in ("training step", "evaluation")
    ),
    Target("scans", ("mamba1",), ("espalier, compiled",), _PEERS, 10),
    Target("scans", ("mamba2",), ("espalier",), _CHUNKED, 2),
    # timm's class as it is built is contiguous; its faster layout is the harder rival.
    *(
        Target("convmixer", words, _OURS, rivals, bar)
        for rivals in (("timm, contiguous",), _TIMM)
        for words, bar in ((("float32", "training step"), 2), (("bf16", "training step"), 3), (("inference",), 1.3))
    ),
)


def ratios(line: Line, target: Target) -> tuple[float, float] | None:
    """Return how many times slower the best rival is than the best of ours, by medians and by least times."""
    rows = line["rows"]
    if not any(n in rows for n in target.ours) or not any(n in rows for n in target.rivals):
        return None

    def best(names: Sequence[str], key: str) -> float:
        return min(rows[name][key] for name in names if name in rows)

    median, least = (best(target.rivals, key) / best(target.ours, key) for key in ("ms", "least"))
    return median, least


def met(lines: Sequence[Line]) -> list[tuple[Target, str, dict[str, tuple[float, float]]]]:
    """Return for every target and case what each processor gave."""
    found = []
    for target in TARGETS:
        cases: dict[str, dict[str, tuple[float, float]]] = {}
        for line in lines:
            if line["benchmark"] != target.benchmark or not all(word in line["case"] for word in target.words):
                continue
            if (pair := ratios(line, target)) is not None:
                cases.setdefault(line["case"], {})[line["processor"]] = pair
        found += [(target, case, by_processor) for case, by_processor in cases.items()]
    return found


def _targets(lines: Sequence[Line]) -> tuple[str, list[str]]:
    processors = sorted({line["processor"] for line in lines})
    rows = met(lines)
    text = [
        "## Against what was asked",
        "",
        "How many times longer the best rival takes than ours: by medians, and by least times in brackets. A number",
        "under its target is in italics. bf16 is asked to gain three times only where the processor has AMX.",
        "",
        f"| case | ours | rival | target | {' | '.join(processors)} |",
        f"|---|---|---|---|{'---|' * len(processors)}",
    ]
    counts = dict.fromkeys(processors, (0, 0))
    for target, case, by_processor in rows:
        cells = []
        for processor in processors:
            if processor not in by_processor:
                cells.append("–")
                continue
            median, least = by_processor[processor]
            asked = not ("bf16" in target.words and "AMX" not in processor)
            good, all_ = counts[processor]
            counts[processor] = good + (asked and median >= target.bar), all_ + asked
            shown = f"{median:.1f} ({least:.1f})"
            cells.append(f"*{shown}*" if asked and median < target.bar else shown)
        names = "best" if len(target.rivals) > 1 else target.rivals[0]
        ours = "ours" if len(target.ours) > 1 else target.ours[0]
        text.append(f"| {target.benchmark}: {case} | {ours} | {names} | {target.bar:g} | {' | '.join(cells)} |")
    said = ", ".join(f"{good} of {all_} on {processor}" for processor, (good, all_) in counts.items())
    return f"**Finding: ratios that reach their target: {said}.**", text


def _section(section: Section, lines: Sequence[Line]) -> list[str]:
    text = ["", f"## {section.title}", "", section.text, "", "```", section.command, "```"]
    for processor in sorted({line["processor"] for line in lines}):
        here = [line for line in lines if line["processor"] == processor]
        names = list(dict.fromkeys(name for line in here for name in line["rows"]))
        first = here[0]
        settings = {name: sorted({line["setting"][name] for line in here}) for name in first["setting"]}
        setting = ", ".join(f"{' or '.join(map(str, values))} {name}" for name, values in settings.items())
        dates, commits = ({line[key] for line in here} for key in ("date", "commit"))
        text += [
            "",
            f"**{processor}**, {setting}, torch {first['torch']}, {' and '.join(sorted(dates))}, commit "
            f"{' and '.join(sorted(commits))}: milliseconds, median (least…largest, n)"
            + (", and MiB." if any("mib" in row for line in here for row in line["rows"].values()) else "."),
            "",
            f"| | {' | '.join(names)} |",
            f"|---|{'---|' * len(names)}",
        ]
        for line in here:
            cells = [_cell(line["rows"][name]) if name in line["rows"] else "–" for name in names]
            text.append(f"| {line['case']} | {' | '.join(cells)} |")
    return text


def _cell(row: Mapping[str, float]) -> str:
    memory = f", {row['mib']:,.0f} MiB" if "mib" in row else ""
    digits = 0 if row["ms"] >= 100 else 1
    spread = f" ({row['least']:.{digits}f}…{row['most']:.{digits}f}, {row['n']})" if row["n"] > 1 else " (once)"
    return f"{row['ms']:,.{digits}f}{spread}{memory}"


def speed_page() -> str:
    """Return the page."""
    lines: list[Line] = [json.loads(line) for line in TIMINGS.read_text(encoding="utf-8").splitlines()]
    finding, text = _targets(lines)
    for section in SECTIONS:
        if own := [line for line in lines if line["benchmark"] == section.benchmark]:
            text += _section(section, own)
    return "\n".join([_HEAD.format(finding=finding), *text, ""])
