"""Noise that is none in one respect: copied, off centre, along one direction, of few values, or pinned at a bound."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import torch

from espalier.doctor.patient import Patient
from espalier.doctor.record import Record, pattern_of
from espalier.doctor.registry import Finding, Severity, register_check

_HALF = (torch.bfloat16, torch.float16)
# Rows looked at, and entries of each: their products take a millisecond.
_ROWS = 128
_COLUMNS = 2048
# Averaged copies of a network start equal on purpose.
_COPIES = re.compile(
    r"teacher|momentum|(^|[._])ema([._]|$)|target|(^|[._])key_encoder|_m\.|shadow|averaged|reference_", re.IGNORECASE
)


@register_check("clones")
def clones(patient: Patient) -> Iterator[Finding]:
    """Two untied parameters with equal bits that look like noise: copied layers start, and partly stay, the same."""
    groups: dict[str, list[Record]] = {}
    for record, stats in patient.measured():
        if record.matrix and stats.noise and record.role not in ("ssm", "position"):
            groups.setdefault(stats.fingerprint, []).append(record)
    for first, *others in groups.values():
        # The fingerprint is of a sample: look at every bit before saying so.
        values = patient.load(first.name) if others else None
        same = [other for other in others if values is not None and torch.equal(values, patient.load(other.name))]
        if same:
            yield from _copies(patient, [first, *same])


def _copies(patient: Patient, members: list[Record]) -> Iterator[Finding]:
    names = [member.name for member in members]
    siblings = len({pattern_of(name) for name in names}) == 1
    heads = all(re.search(r"head|classifier|embed|pred", name, re.IGNORECASE) for name in names)
    severity: Severity = "error" if siblings or not heads else "warning"
    remedy = "draw every layer again (reset_parameters), or tie them if sharing is meant"
    if not all(map(patient.learns, members)) or any(_COPIES.search(name) for name in names):
        severity, remedy = "note", "usual for an averaged or frozen copy; otherwise draw it again"
    elif patient.model is None and severity == "warning":  # files keep tied weights twice
        return
    for name in names[1:]:
        yield Finding(severity, name, "clones", f"equal to {names[0]}", "noise of its own", remedy)


@register_check("off-centre", fresh_only=True)
def off_centre(patient: Patient) -> Iterator[Finding]:
    """A drawn weight whose mean is not zero: ``rand`` for ``randn``, or a constant that was added to it.

    Every output then holds (mean · fan-in) times the mean of the inputs, the same in all units.
    """
    for record, stats in patient.measured():
        # Half a deviation costs nothing in a small layer; chance reaches 6 deviations of the mean in no layer.
        if _drawn(record, patient) and abs(stats.mean) > stats.std * max(0.5, 6 / math.sqrt(stats.numel)):
            yield Finding(
                "warning", record.name, "off-centre", f"mean {stats.mean:.2g}, deviation {stats.std:.2g}",
                "a mean of zero", "draw it about zero (randn, or uniform in ±b): all units get one common output",
            )  # fmt: skip


@register_check("one-direction", scope="tensor", fresh_only=True)
def one_direction(record: Record, patient: Patient) -> Iterator[Finding]:
    """Rows that are all but multiples of one another: an outer product, or one row copied and scaled.

    Measured is the number of directions that the rows r_i of unit length share out among them, n² / Σ_ij (r_i·r_j)²:
    1 where all are parallel, n where all are orthogonal.
    """
    stats, rows = record.stats, record.units if _drawn(record, patient) else None
    if stats is None or rows is None or min(rows.shape) < 16:
        return
    rows = rows[:: -(-len(rows) // _ROWS), :: -(-rows.shape[1] // _COLUMNS)].to("cpu", torch.float64)
    rows = rows / rows.abs().max().clamp(min=torch.finfo(torch.float64).tiny)  # squares of 1e200 overflow
    lengths = rows.norm(dim=1)
    kept = rows[lengths > 0] / lengths[lengths > 0, None]
    if len(kept) < 8:
        return
    directions = len(kept) ** 2 / float((kept @ kept.T).square().sum())
    # Rows off centre share a direction too, and are named as that.
    if directions < 2 and abs(stats.mean) < 0.5 * stats.std:
        yield Finding(
            "error" if directions < 1.05 else "warning", record.name, "one-direction",
            f"{len(kept)} of its rows share {directions:.2g} directions", "nearly as many as there are rows or columns",
            "draw every row on its own: all units answer to one feature of their input",
        )  # fmt: skip


def _drawn(record: Record, patient: Patient) -> bool:
    """Return whether a weight that is no set of filters was drawn from noise, and is to be trained."""
    stats = record.stats
    if stats is None or stats.nonfinite or not stats.noise or record.filters or not record.matrix:
        return False
    return record.role in ("weight", "embedding") and patient.learns(record)


@register_check("few-values")
def few_values(patient: Patient) -> Iterator[Finding]:
    """A drawn weight that holds few distinct values: uniform noise in bfloat16 has 256 levels, and zero among them."""
    for record, stats in patient.measured():
        # Filters and identities that somebody wrote are mostly zeros and ones; noise has few exact zeros.
        noisy = stats.sampled >= 2048 and stats.zeros < stats.sampled // 4 and abs(stats.correlation) < 0.5
        weight = record.matrix and record.role in ("weight", "embedding") and patient.learns(record)
        if not noisy or not weight or stats.constant:
            continue
        severity: Severity = "warning"
        remedy = "draw it in float32, then cast"
        if stats.distinct > 64:
            if record.dtype not in _HALF or stats.distinct > 520 or stats.sampled < 8192:
                continue
            severity, remedy = "note", f"uniform noise was drawn in {str(record.dtype)[6:]}: {remedy}"
        measured = f"{stats.distinct} distinct values of {stats.sampled:,}"
        yield Finding(severity, record.name, "few-values", measured, "thousands", remedy)


@register_check("pinned")
def pinned(patient: Patient) -> Iterator[Finding]:
    """Many entries at one extreme, far outside the rest: a truncated normal whose uniform draw hit zero (bfloat16)."""
    for record, stats in patient.measured():
        if not record.matrix or stats.constant or stats.distinct <= 64:
            continue
        low, high = stats.at_minimum, stats.at_maximum
        count, value = (low, stats.minimum) if low >= high else (high, stats.maximum)
        share = count / stats.sampled
        # What the rest looks like without the pinned entries.
        rest = stats.rms * max(1 - share * (value / stats.rms) ** 2, 0.0) ** 0.5 if stats.rms else 0.0
        if count >= 3 and share >= 1e-4 and value != 0 and abs(value) > 6 * rest:
            yield Finding(
                "error", record.name, "pinned", f"{share:.2%} of its entries are {value:.4g}, the rest near {rest:.2g}",
                "no entry twice at a bound", "draw the truncated normal in float32, then cast",
            )  # fmt: skip
