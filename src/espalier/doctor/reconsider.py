"""What a pass with a batch says of the findings that the weights alone gave: some are confirmed, some withdrawn."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import nn

from espalier.doctor.asked import multiplier, of_torch
from espalier.doctor.checks.constant import (
    all_zero,
    equal_pieces,
    holds_both,
    looks_drawn,
    reads,
    repeated,
    zero_matrices,
)
from espalier.doctor.checks.scale import SMALLEST, drowned, gain_of, largest_gain, scale_finding
from espalier.doctor.patient import LARGEST_BIAS, Patient, Record
from espalier.doctor.registry import Finding
from espalier.doctor.watch import Activity

# Gradients of equal units differ by rounding alone, far less than this share of their size.
_SAME = 1e-3
# Deviations over the batch that the mean of a layer's outputs may reach.
_DROWNED = 20.0
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def reconsider(findings: list[Finding], patient: Patient, activity: Activity) -> list[Finding]:
    """Return the static findings as a forward and a backward pass leave them.

    Args:
        findings: of the static checks.
        patient: the model, with the gradients of the backward pass.
        activity: what the forward pass showed.
    """
    kept = []
    for finding in findings:
        record = patient.find(finding.layer)
        if record is None or record.buffer or not record.trainable:
            kept.append(finding)
        elif finding.check == "equal-units":
            kept.append(_equal_units(finding, record, patient))
        elif finding.check == "constant":
            kept.append(_constant(finding, record, patient))
        elif finding.check != "scale" or not _in_range(record, patient, activity):
            kept.append(finding)
    return kept


def _equal_units(finding: Finding, record: Record, patient: Patient) -> Finding:
    """Equal pieces of a table that was computed part where their gradients differ, and stay equal where they do not."""
    gradient = record.gradient
    if gradient is None or (record.multiplies and (record.module is None or of_torch(record.module))):
        return finding
    values = patient.load(record.name)
    number = equal_pieces(values, patient.heads)
    # Noise is drawn once for every unit: that it repeats is a fault whatever becomes of it.
    if number < 2 or looks_drawn(values.reshape(number, -1)[0]):
        return finding
    pieces = gradient.reshape(number, -1).double()
    size = float(pieces.norm())
    if not 0 < size < math.inf:
        return finding
    if float((pieces - pieces.mean(0)).norm()) > _SAME * size:
        return repeated(record, number, "note")
    return repeated(record, number, "error", ", with equal gradients")


def _constant(finding: Finding, record: Record, patient: Patient) -> Finding:
    """A bare parameter of zero: does a gradient reach it or not?"""
    stats, gradient = record.stats, record.gradient
    if stats is None or stats.magnitude or record.multiplies or record.role == "embedding" or gradient is None:
        return finding
    if finding.severity == "error" and not holds_both(record) and bool(gradient.any()):
        return all_zero(record, "note")
    # Behind another zero, such as a head that starts closed, no gradient passes in the first step alone.
    if finding.severity == "note" and reads(record, patient) and not gradient.any() and _only_zero(record, patient):
        return all_zero(record, "error")
    return finding


def _only_zero(record: Record, patient: Patient) -> bool:
    others = [s for r, s in patient.measured() if r is not record and not r.buffer and "bias" not in r.leaf]
    return zero_matrices(patient) == [record] and all(stats.magnitude > 0 for stats in others)


def _in_range(record: Record, patient: Patient, activity: Activity) -> bool:
    """Return whether a module's outputs are about as large as its inputs, whatever its weights suggest.

    Beside a bias the outputs of torch's layers say nothing of a weight that is too small.
    """
    lowest = SMALLEST if gain_of(record, patient) < SMALLEST else 0.0
    own = record.module is not None and not of_torch(record.module)
    # Torch's attention and recurrences bound their outputs: of their weights these say nothing.
    plain = own or (isinstance(record.module, _LAYERS) and not lowest)
    growth = activity.growth(record.layer)
    return plain and growth is not None and lowest < growth <= largest_gain(record)


def judge_weights(patient: Patient, activity: Activity) -> Iterator[Finding]:
    """Yield findings on weights and biases that only a batch can give."""
    for record, stats in patient.measured():
        # Of a class that could not be asked what it makes of its weight, what goes in and out says it.
        growth, largest = activity.growth(record.layer) or 0.0, largest_gain(record)
        large = growth > largest and gain_of(record, patient) > largest
        if large and record.multiplies and multiplier(record.module, record.leaf, record.fans[0]) is None:
            yield scale_finding(record, growth)
        mean, spread = activity.constant.get(record.layer, (0.0, 0.0))
        due = record.role == "bias" and record.trainable and stats.rms > mean / 2
        if due and mean > max(LARGEST_BIAS, _DROWNED * spread) and activity.is_read(record.layer):
            yield drowned(record, f"the output's mean {mean:.3g}, its deviation over the batch {spread:.2g}")
