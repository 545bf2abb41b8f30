"""Position tables that are computed, not learned: lost when a model is built on the meta device and only emptied."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from espalier.doctor.finding import Finding
from espalier.doctor.patient import Patient
from espalier.doctor.record import Record
from espalier.doctor.registry import register_check

_REMEDY = "compute it again after to_empty or loading: it is not in the checkpoint"
_FREQUENCIES = re.compile(r"(^|[._])inv_freq$")
_WAVES = re.compile(r"(^|[._])(cos|sin)(_cached|_cache)?$|freqs_(cos|sin)$")
_IDS = re.compile(r"(position_ids|relative_position_index|relative_coords_index)$")


@register_check("positions", scope="tensor")
def positions(record: Record, patient: Patient) -> Iterator[Finding]:
    """Rotary frequencies fall from about one to above zero, cosines stay within ±2, position ids count."""
    values = record.values
    if values is None or not (record.buffer or not record.trainable):
        return
    if _FREQUENCIES.search(record.name) and values.is_floating_point() and values.ndim == 1:
        yield from _frequencies(record, values.float())
    elif _WAVES.search(record.name) and values.is_floating_point():
        largest = float(values.float().abs().max())
        # Scaled rotary embeddings (YaRN) multiply both by at most about 2.
        if not largest <= 4:
            yield _lost(record, f"magnitudes up to {largest:.3g}", "within ±1")
        elif largest == 0:
            yield _lost(record, "all zero", "cosines and sines")
    elif _IDS.search(record.name) and not values.is_floating_point() and values.dtype != torch.bool:
        low, high = int(values.min()), int(values.max())
        # Ids index a table: no model has a hundred million positions, and none counts downwards from zero.
        if (
            low < -1
            or high > 100_000_000
            or (values.numel() > 1 and low == high == 0 and "position_ids" in record.name)
        ):
            yield _lost(record, f"from {low} to {high}", f"0 to {values.shape[-1] - 1}")


def _frequencies(record: Record, values: torch.Tensor) -> Iterator[Finding]:
    finite = bool(torch.isfinite(values).all())
    rises, falls = (int(count) for count in ((values.diff() > 0).sum(), (values.diff() < 0).sum()))
    # Images have a run of frequencies for each axis, so that the order may start again a few times.
    ordered = finite and min(rises, falls) <= min(3, len(values) // 4)
    # Partial rotations end in zeros; frequencies of pixels reach some hundred.
    sane = finite and float(values.min()) >= 0 and 1e-4 <= float(values.max()) <= 1e4
    if not (ordered and sane):
        shown = ", ".join(f"{float(value):.3g}" for value in values[:3])
        yield _lost(record, f"{shown}, …", "1, falling towards 1/θ")


def _lost(record: Record, measured: str, usual: str) -> Finding:
    return Finding("error", record.name, "positions", measured, usual, _REMEDY)
