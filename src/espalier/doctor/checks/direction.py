"""Noise that is none in one respect: weights off centre, rows along one direction."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from espalier.doctor.finding import Finding
from espalier.doctor.patient import Patient
from espalier.doctor.record import Record
from espalier.doctor.registry import register_check

# Rows looked at, and entries of each: their products take a millisecond.
_ROWS = 128
_COLUMNS = 2048


@register_check("off-centre", fresh_only=True)
def off_centre(patient: Patient) -> Iterator[Finding]:
    """A drawn weight whose mean is not zero: ``rand`` for ``randn``, or a constant that was added to it.

    Every output then holds (mean · fan-in) times the mean of the inputs, the same in all units.
    """
    for record in patient.records:
        stats = record.stats
        if stats is None or not _drawn(record, patient) or record.filters:
            continue
        # Half a deviation costs nothing in a small layer; chance reaches 6 deviations of the mean in no layer.
        if abs(stats.mean) > stats.std * max(0.5, 6 / math.sqrt(stats.numel)):
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
    if not _drawn(record, patient) or record.filters:
        return
    rows = record.units
    if rows is None or min(rows.shape) < 16:
        return
    rows = rows[:: -(-len(rows) // _ROWS), :: -(-rows.shape[1] // _COLUMNS)].to("cpu", torch.float64)
    rows = rows / rows.abs().max().clamp(min=torch.finfo(torch.float64).tiny)  # squares of 1e200 overflow
    lengths = rows.norm(dim=1)
    kept = rows[lengths > 0] / lengths[lengths > 0, None]
    if len(kept) < 8:
        return
    directions = len(kept) ** 2 / float((kept @ kept.T).square().sum())
    # Rows off centre share a direction too, and are named as that.
    stats = record.stats
    if directions < 2 and stats is not None and abs(stats.mean) < 0.5 * stats.std:
        yield Finding(
            "error" if directions < 1.05 else "warning", record.name, "one-direction",
            f"{len(kept)} of its rows share {directions:.2g} directions", "nearly as many as there are rows or columns",
            "draw every row on its own: all units answer to one feature of their input",
        )  # fmt: skip


def _drawn(record: Record, patient: Patient) -> bool:
    stats = record.stats
    return (
        stats is not None
        and record.matrix
        and record.role in ("weight", "embedding")
        and not stats.nonfinite
        and stats.noise
        and (record.trainable or patient.model is None)
    )
