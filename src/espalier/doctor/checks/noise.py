"""Noise that is none in one respect: off centre, along one direction, of few values, or pinned at a bound."""

from __future__ import annotations

import math

import torch

from espalier.doctor.patient import Patient, Record
from espalier.doctor.registry import Verdict, judges
from espalier.doctor.stats import TensorStats

_HALF = (torch.bfloat16, torch.float16)
# Rows looked at, and entries of each: their products take a millisecond.
_ROWS = 128
_COLUMNS = 2048


@judges("off-centre", fresh_only=True)
def off_centre(record: Record, stats: TensorStats, patient: Patient) -> Verdict:
    """A drawn weight whose mean is not zero: ``rand`` for ``randn``, or a constant that was added to it.

    Every output then holds (mean · fan-in) times the mean of the inputs, the same in all units.
    """
    # Half a deviation costs nothing in a small layer; chance reaches 6 deviations of the mean in no layer.
    off = abs(stats.mean) > stats.std * max(0.5, 6 / math.sqrt(stats.numel))
    # A table is looked up and a bare parameter may be one (DETR draws its rows and columns by rand): no input's mean
    # is multiplied there.
    multiplies = record.role == "weight" and record.multiplies
    if not off or not multiplies or not _drawn(record, stats, patient):
        return None
    remedy = "draw it about zero (randn, or uniform in ±b): all units get one common output"
    return "warning", f"mean {stats.mean:.2g}, deviation {stats.std:.2g}", "a mean of zero", remedy


@judges("one-direction", scope="tensor", fresh_only=True)
def one_direction(record: Record, stats: TensorStats, patient: Patient) -> Verdict:
    """Rows that are all but multiples of one another: an outer product, or one row copied and scaled.

    Measured is the number of directions that the rows r_i of unit length share out among them, n² / Σ_ij (r_i·r_j)²:
    1 where all are parallel, n where all are orthogonal.
    """
    rows = record.units if _drawn(record, stats, patient) else None
    if rows is None or min(rows.shape) < 16:
        return None
    rows = rows[:: -(-len(rows) // _ROWS), :: -(-rows.shape[1] // _COLUMNS)].to("cpu", torch.float64)
    rows = rows / rows.abs().max().clamp(min=torch.finfo(torch.float64).tiny)  # squares of 1e200 overflow
    lengths = rows.norm(dim=1)
    kept = rows[lengths > 0] / lengths[lengths > 0, None]
    directions = len(kept) ** 2 / float((kept @ kept.T).square().sum()) if len(kept) >= 8 else math.inf
    # Rows off centre share a direction too, and are named as that.
    if not (directions < 2 and abs(stats.mean) < 0.5 * stats.std):
        return None
    measured = f"{len(kept)} of its rows share {directions:.2g} directions"
    remedy = "draw every row on its own: all units answer to one feature of their input"
    usual = "nearly as many as there are rows or columns"
    return "error" if directions < 1.05 else "warning", measured, usual, remedy


def _drawn(record: Record, stats: TensorStats, patient: Patient) -> bool:
    """Return whether a weight that is no set of filters was drawn from noise, and is to be trained."""
    noise = stats.noise and not stats.nonfinite and record.matrix and not record.filters
    return noise and record.role in ("weight", "embedding") and patient.learns(record)


@judges("few-values")
def few_values(record: Record, stats: TensorStats, patient: Patient) -> Verdict:
    """A drawn weight that holds few distinct values: uniform noise in bfloat16 has 256 levels, and zero among them."""
    # Filters and identities that somebody wrote are mostly zeros and ones; noise has few exact zeros.
    noisy = stats.sampled >= 2048 and stats.zeros < stats.sampled // 4 and abs(stats.correlation) < 0.5
    weight = record.matrix and record.role in ("weight", "embedding") and patient.learns(record)
    if not noisy or not weight or stats.constant:
        return None
    measured, remedy = f"{stats.distinct} distinct values of {stats.sampled:,}", "draw it in float32, then cast"
    if stats.distinct <= 64:
        return "warning", measured, "thousands", remedy
    if record.dtype in _HALF and stats.distinct <= 520 and stats.sampled >= 8192:
        return "note", measured, "thousands", f"uniform noise was drawn in {str(record.dtype)[6:]}: {remedy}"
    return None


@judges("pinned")
def pinned(record: Record, stats: TensorStats, patient: Patient) -> Verdict:
    """Many entries at one extreme, far outside the rest: a truncated normal whose uniform draw hit zero (bfloat16)."""
    if not record.matrix or stats.constant or stats.distinct <= 64:
        return None
    low, high = stats.at_minimum, stats.at_maximum
    count, value = (low, stats.minimum) if low >= high else (high, stats.maximum)
    share = count / stats.sampled
    # What the rest looks like without the pinned entries.
    rest = stats.rms * max(1 - share * (value / stats.rms) ** 2, 0.0) ** 0.5 if stats.rms else 0.0
    if not (count >= 3 and share >= 1e-4 and value != 0 and abs(value) > 6 * rest):
        return None
    rows = patient.load(record.name).flatten(1)
    places = (rows == value).nonzero()
    if bool((places[:, 1] - places[:, 0] == places[0, 1] - places[0, 0]).all()):
        return None  # one diagonal: the taps of a filter, written as a matrix
    rows = rows[(rows == value).any(1)]
    if bool(((rows == value).sum(1) == 1).all()) and int(rows.count_nonzero()) == len(rows):
        return None  # an identity beside what was drawn, as values in a fused projection
    measured = f"{share:.2%} of its entries are {value:.4g}, the rest near {rest:.2g}"
    return "error", measured, "no entry twice at a bound", "draw the truncated normal in float32, then cast"
