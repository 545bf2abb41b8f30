"""The size of weights: against their fan-in, against the same weight of other layers, and through depth."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from statistics import median

from torch import nn

from espalier.doctor.asked import multiplier
from espalier.doctor.patient import Patient, Record
from espalier.doctor.registry import Finding, Severity, register_check
from espalier.doctor.stats import TensorStats
from espalier.init import StructureReport

# Gain = rms·√fan, of the smaller fan, as starts by fan-in and by fan-out are both usual: 1 keeps the variance, √2 does
# before a ReLU, 0.58 is torch's default, and 0.02 in a matrix of 53,248 × 16,384, among the largest published, is 2.6.
# Convolutions get twice as much: nearly all are followed by batch norm, and Inception's published start reaches 5.1.
_LARGEST = 4.0
SMALLEST = 1e-5


@register_check("scale", fresh_only=True)
def scale(patient: Patient) -> Iterator[Finding]:
    """A weight whose outputs are many times larger than its inputs, or all but zero.

    A layer of a class of its own may scale its weight in every pass, as equalised layers do: it is asked, and where it
    gives no answer only a batch can tell.
    """
    for record in patient.records:
        gain = gain_of(record, patient)
        if not _sized(gain, record):
            continue
        share = multiplier(record.module, record.leaf, record.fans[0])
        # A bare parameter is taken for what it looks like; a weight that is computed, or scaled, is not judged.
        if share is None and not record.multiplies:
            share = 1.0
        if share is not None and _sized(gain * share, record):
            yield scale_finding(record, gain * share)


def scale_finding(record: Record, gain: float) -> Finding:
    """Return what is to be said of a weight of this gain."""
    small = gain < SMALLEST
    remedy = "scale it up, or set it to zero if the branch is to start closed" if small else "scale it down"
    assert record.stats is not None
    severity: Severity = "error" if gain > 100 * largest_gain(record) else "warning"
    measured = f"rms {record.stats.rms:.3g}, {gain:.2g} over the root of {min(record.fans)}"
    usual = "0.02, or 0.5 to 1.4 over the root of the smaller fan"
    return Finding(severity, record.name, "scale", measured, usual, remedy)


def gain_of(record: Record, patient: Patient) -> float:
    """Return rms·√fan of a weight, 0 where none is to be judged."""
    stats = record.stats
    if stats is None or record.role != "weight" or not record.matrix or stats.nonfinite or stats.constant:
        return 0.0
    gain = stats.rms * math.sqrt(min(record.fans))
    drawn = stats.noise and patient.learns(record)
    if gain < SMALLEST:
        # Beside a constant bias a layer starts as that constant on purpose (gMLP's gates, open by a bias of one).
        bias = patient.find(f"{record.layer}.bias")
        return 0.0 if bias is not None and bias.stats is not None and _states(bias.stats) else gain
    return gain if drawn else 0.0


def _states(bias: TensorStats) -> bool:
    return bias.constant and bias.magnitude > 0


def largest_gain(record: Record) -> float:
    """Return the largest gain of a healthy start."""
    return _LARGEST * (2 if len(record.shape) > 2 else 1)


def _sized(gain: float, record: Record) -> bool:
    return gain > largest_gain(record) or 0 < gain < SMALLEST


@register_check("scale-of-inputs", fresh_only=True)
def scale_of_inputs(patient: Patient) -> Iterator[Finding]:
    """Tables and biases that drown what they are added to.

    Published starts draw tables of tokens and positions with deviations up to 1, and biases within ±1/√fan-in; gates
    and detectors start at constants of up to ten.
    """
    tokens = max((s.rms for r, s in patient.measured() if r.role == "embedding" and r.matrix), default=0.0)
    for record, stats in patient.measured():
        if stats.nonfinite or not patient.learns(record):
            continue
        if record.role == "bias" and patient.drowns(record):
            yield drowned(record, f"the weight's outputs near {patient.output_beside(record) or 0:.2g}")
        # Two or three rows turn coordinates into random Fourier features: they are multiplied, and none is added.
        looked_up = record.role == "embedding" or isinstance(record.module, nn.Embedding | nn.EmbeddingBag)
        features = not looked_up and record.matrix and min(size for size in record.shape if size > 1) < 8
        if record.role in ("embedding", "position") and record.matrix and stats.noise and not features:
            alone = record.role == "embedding" or not tokens
            if stats.rms > _LARGEST or (not alone and stats.rms > 0.5 and stats.rms > 100 * tokens):
                measured = f"rms {stats.rms:.3g}" + ("" if alone else f", the tokens' {tokens:.3g}")
                remedy = "scale it down: the table drowns what it is added to"
                yield Finding("warning", record.name, "scale-of-inputs", measured, "0.02 to 1", remedy)


def drowned(record: Record, beside: str) -> Finding:
    """Return what is to be said of a bias beside which its layer's weight does not count."""
    assert record.stats is not None
    measured, usual = f"rms {record.stats.rms:.3g}, {beside}", "zero, or within ±1/√fan-in"
    remedy = "set the bias to zero: it drowns what the weight says of the input"
    return Finding("warning", record.name, "scale-of-inputs", measured, usual, remedy)


@register_check("out-of-line")
def out_of_line(patient: Patient) -> Iterator[Finding]:
    """One layer's weight far larger or smaller than the same weight of its siblings, or one that grows with depth.

    Starts that follow the depth smoothly (as BEiT's) are none of this: a layer must also differ from its neighbours.
    Neither are layers that the report in ``against`` says were written, where it left their siblings alone.
    """
    rows = patient.against.layers if isinstance(patient.against, StructureReport) else ()
    written = tuple(f"{row.layer}." for row in rows if row.status in ("written", "present"))
    far, near = (25.0, 12.0) if patient.trained else (4.0, 2.5)
    for kin in patient.kin.values():
        drawn = [(r, s) for r, s in kin if r.role == "weight" and r.matrix and s.noise and not s.nonfinite]
        if len(drawn) < 4:
            continue
        members, sizes = [record for record, _ in drawn], [math.log(stats.rms) for _, stats in drawn]
        middle = median(sizes)
        spread = 1.4826 * median(abs(size - middle) for size in sizes)
        rises = [later - earlier for earlier, later in pairwise(sizes)]
        # A step before the first and one after the last, so that those have two neighbours as well.
        steps = [math.inf, *map(abs, rises), math.inf]
        lonely = [min(pair) > math.log(near) for pair in pairwise(steps)]
        odd = [i for i, size in enumerate(sizes) if lonely[i] and abs(size - middle) > max(math.log(far), 6 * spread)]
        # More than a few odd ones are a pattern of the architecture, not a fault of a layer.
        for index in odd if len(odd) <= max(1, len(sizes) // 6) else ():
            member, ratio = members[index], math.exp(sizes[index] - middle)
            if member.name.startswith(written):
                continue
            measured = f"rms {math.exp(sizes[index]):.3g}, {ratio:.2g} times its siblings'"
            remedy = "initialise this layer as its siblings are: it was replaced, loaded in part, or written twice"
            yield Finding("warning", member.name, "out-of-line", measured, f"near {math.exp(middle):.3g}", remedy)
        if not patient.trained and min(rises) > 0.05 and sum(rises) > math.log(8):
            measured = f"rms grows {math.exp(sum(rises)):.2g} times from the first layer to the last"
            remedy = "scale residual branches down with depth (1/√(2·layers)), not up"
            yield Finding("warning", members[-1].name, "out-of-line", measured, "constant, or falling", remedy)
