"""State-space layers: decay, step size, skip and convolution against what published starts give.

Published starts: A from 1 to 256 (Mamba-1 counts, Mamba-2 draws from [1, 16], gated delta nets from (0, 16]), so A_log
in [−9, 5.6], and −8 or less, also everywhere, in the mimetic start; softplus(dt_bias) from 1e-4 to 0.1, or 1 in the
mimetic one; D of one (Mamba) or standard normal (S4, H3).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from espalier.doctor.finding import Finding, Severity
from espalier.doctor.patient import Patient
from espalier.doctor.record import Record
from espalier.doctor.registry import register_check

_MIMETIC_BIAS = math.log(math.expm1(1.0))
_DECAY = "A_log from log 1 to log 16, different from head to head"
_SKIP = "D of one, or standard normal"
_STEP = "softplus⁻¹ of steps between 1e-3 and 0.1: −6.9 to −2.3"


@register_check("state-space")
def state_space(patient: Patient) -> Iterator[Finding]:
    """A_log, dt_bias (or the bias of ``dt_proj``), D and the convolution of every layer that has an A_log."""
    for record in patient.records:
        if record.leaf != "A_log" or record.stats is None:
            continue
        steps = [patient.find(f"{record.layer}.{leaf}".lstrip(".")) for leaf in ("dt_bias", "dt_proj.bias")]
        # Gated delta nets, which have no skip D, publish a dt_bias of one; Mamba-2 draws both.
        skip = patient.find(f"{record.layer}.D".lstrip("."))
        drawn = any(s is not None and s.stats is not None and not s.stats.constant for s in steps)
        if not (drawn and _bounded(record, patient)):
            yield from _decay(record, patient, gated=skip is None and drawn)
        for step in steps:
            if step is not None and step.stats is not None:
                yield from _step(step, patient, drawn=skip is not None)
        if skip is not None and skip.stats is not None:
            yield from _skip(skip, patient)
        convolution = patient.find(f"{record.layer}.conv1d.weight".lstrip("."))
        if convolution is not None and convolution.stats is not None and convolution.stats.magnitude == 0:
            yield Finding(
                "error", convolution.name, "state-space", "all zero", "noise, or the identity",
                "initialise the convolution: nothing reaches the state",
            )  # fmt: skip


def _bounded(record: Record, patient: Patient) -> bool:
    """Return whether the gate's decay has a lower bound: such gates start at a decay of one in every head."""
    says = patient.config if record.module is None else vars(record.module)
    return any(name.endswith("lower_bound") and value is not None for name, value in says.items())


def _decay(record: Record, patient: Patient, *, gated: bool) -> Iterator[Finding]:
    stats = record.stats
    assert stats is not None
    if stats.maximum > 12 or stats.minimum < -30:
        yield Finding(
            "error", record.name, "state-space", f"A_log from {stats.minimum:.3g} to {stats.maximum:.3g}", _DECAY,
            "initialise it again, on every rank: exp(A_log) is the decay",
        )  # fmt: skip
    elif not patient.trained and stats.constant and stats.numel > 1 and stats.minimum > -4:
        severity: Severity = "error" if stats.minimum == 0 and not gated else "warning"
        yield Finding(
            severity, record.name, "state-space", f"all {stats.minimum:.3g}", _DECAY,
            "initialise it again: a wrapper, loading or sharding overwrote it",
        )  # fmt: skip
    elif not patient.trained and stats.minimum < -9 and stats.nonfinite == 0 and stats.maximum > -1:
        yield Finding(
            "warning", record.name, "state-space", f"A_log down to {stats.minimum:.3g}", _DECAY,
            "some heads never forget: draw A away from zero",
        )  # fmt: skip


def _step(record: Record, patient: Patient, *, drawn: bool) -> Iterator[Finding]:
    stats = record.stats
    assert stats is not None
    if stats.magnitude > 100:
        severity, measured = "error", f"from {stats.minimum:.3g} to {stats.maximum:.3g}"
    elif patient.trained or not drawn or not record.matrix | (stats.numel > 1):
        return
    elif stats.constant and abs(stats.minimum - _MIMETIC_BIAS) > 0.05:
        # It trains, and badly; untouched Jamba (0) and Bamba (1) start so.
        step = math.log1p(math.exp(min(stats.minimum, 50.0)))
        severity, measured = "warning", f"all {stats.minimum:.3g}: every step is {step:.3g}"
    elif not stats.constant and (stats.maximum > 3 or (stats.mean > -0.5 and stats.std < 0.3)):
        severity, measured = "warning", f"mean {stats.mean:.2g}, up to {stats.maximum:.3g}"
    else:
        return
    yield Finding(
        severity, record.name, "state-space", measured, _STEP,  # type: ignore[arg-type]
        "write it after everything that initialises linear layers (init_weights, post_init), then audit",
    )  # fmt: skip


def _skip(record: Record, patient: Patient) -> Iterator[Finding]:
    stats = record.stats
    assert stats is not None
    if stats.magnitude > 10:
        severity: Severity = "error" if stats.magnitude > 100 else "warning"
        measured = f"reaches {stats.magnitude:.3g}"
    elif not patient.trained and stats.constant and stats.numel > 1 and stats.minimum != 1:
        severity, measured = "warning", f"all {stats.minimum:.3g}"
    else:
        return
    yield Finding(
        severity, record.name, "state-space", measured, _SKIP,
        "set it to one after everything that initialises: it adds the layer's own input to what the state gives",
    )  # fmt: skip
