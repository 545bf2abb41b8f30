"""Noise that lost its resolution: few distinct values, or many entries pinned at one bound."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from espalier.doctor.finding import Finding
from espalier.doctor.patient import Patient
from espalier.doctor.registry import register_check

_HALF = (torch.bfloat16, torch.float16)


@register_check("few-values")
def few_values(patient: Patient) -> Iterator[Finding]:
    """A drawn weight that holds few distinct values: uniform noise in bfloat16 has 256 levels, and zero among them."""
    for record in patient.records:
        stats = record.stats
        if stats is None or not record.matrix or record.role not in ("weight", "embedding") or stats.constant:
            continue
        # Filters and identities that somebody wrote are mostly zeros and ones; noise has few exact zeros.
        drawn = stats.sampled >= 2048 and stats.zeros < stats.sampled // 4 and abs(stats.correlation) < 0.5
        if not drawn or not (record.trainable or patient.model is None):
            continue
        if stats.distinct <= 64:
            yield Finding(
                "warning", record.name, "few-values", f"{stats.distinct} distinct values of {stats.sampled:,}",
                "thousands", "draw it in float32, then cast",
            )  # fmt: skip
        elif record.dtype in _HALF and stats.distinct <= 520 and stats.sampled >= 8192:
            yield Finding(
                "note", record.name, "few-values", f"{stats.distinct} distinct values of {stats.sampled:,}",
                "thousands", f"uniform noise was drawn in {str(record.dtype)[6:]}: draw it in float32, then cast",
            )  # fmt: skip


@register_check("pinned")
def pinned(patient: Patient) -> Iterator[Finding]:
    """Many entries at one extreme, far outside the rest: a truncated normal whose uniform draw hit zero (bfloat16)."""
    for record in patient.records:
        stats = record.stats
        if stats is None or not record.matrix or record.buffer or stats.constant or stats.distinct <= 64:
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
