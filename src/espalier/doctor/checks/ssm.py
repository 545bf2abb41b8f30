"""State-space layers: decay, step size, skip and convolution against what published starts give.

Published starts: A from 1 to 256 (Mamba-1 counts, Mamba-2 draws from [1, 16], gated delta nets from (0, 16]), so A_log
in [−9, 5.6], and −8 or less, also everywhere, in the mimetic start; softplus(dt_bias) from 1e-4 to 0.1, or 1 in the
mimetic one; D of one (Mamba) or standard normal (S4, H3).
"""

from __future__ import annotations

import math
import re

from espalier.doctor.patient import Patient, Record
from espalier.doctor.registry import Verdict, judges
from espalier.doctor.stats import TensorStats

_PARTS = re.compile(r"(.*\.)?(A_log|dt_bias|dt_proj\.bias|D|conv1d\.weight)")
_MIMETIC_BIAS = math.log(math.expm1(1.0))
_DECAY = "A_log from log 1 to log 16, different from head to head"
_SKIP = "D of one, or standard normal"
_STEP = "softplus⁻¹ of steps between 1e-3 and 0.1: −6.9 to −2.3"


@judges("state-space")
def state_space(record: Record, stats: TensorStats, patient: Patient) -> Verdict:
    """A_log, dt_bias (or the bias of ``dt_proj``), D and the convolution of every layer that has an A_log."""
    match = _PARTS.fullmatch(record.name)
    if match is None:
        return None
    layer, part = match[1] or "", match[2]
    decay, skip, *steps = (patient.find(layer + name) for name in ("A_log", "D", "dt_bias", "dt_proj.bias"))
    if decay is None or decay.stats is None:
        return None
    if part == "A_log":
        drawn = any(step.stats is not None and not step.stats.constant for step in steps if step is not None)
        # Gated delta nets, which have no skip D, publish a dt_bias of one; Mamba-2 draws both.
        bounded = drawn and _bounded(record, patient)
        return None if bounded else _decay(stats, trained=patient.trained, gated=drawn and skip is None)
    if part == "D":
        return _skip(stats, trained=patient.trained)
    if part == "conv1d.weight":
        remedy = "initialise the convolution: nothing reaches the state"
        return ("error", "all zero", "noise, or the identity", remedy) if stats.magnitude == 0 else None
    return _step(stats, fresh=skip is not None and not patient.trained)


def _bounded(record: Record, patient: Patient) -> bool:
    """Return whether the gate's decay has a lower bound: such gates start at a decay of one in every head."""
    says = patient.config if record.module is None else vars(record.module)
    return any(name.endswith("lower_bound") and value is not None for name, value in says.items())


def _decay(stats: TensorStats, *, trained: bool, gated: bool) -> Verdict:
    if stats.maximum > 12 or stats.minimum < -30:
        measured = f"A_log from {stats.minimum:.3g} to {stats.maximum:.3g}"
        return "error", measured, _DECAY, "initialise it again, on every rank: exp(A_log) is the decay"
    if not trained and stats.constant and stats.numel > 1 and stats.minimum > -4:
        remedy = "initialise it again: a wrapper, loading or sharding overwrote it"
        return "error" if stats.closed and not gated else "warning", f"all {stats.minimum:.3g}", _DECAY, remedy
    if not trained and stats.minimum < -9 and not stats.nonfinite and stats.maximum > -1:
        remedy = "some heads never forget: draw A away from zero"
        return "warning", f"A_log down to {stats.minimum:.3g}", _DECAY, remedy
    return None


def _step(stats: TensorStats, *, fresh: bool) -> Verdict:
    remedy = "write it after everything that initialises linear layers (init_weights, post_init), then audit"
    if stats.magnitude > 100:
        return "error", f"from {stats.minimum:.3g} to {stats.maximum:.3g}", _STEP, remedy
    if not fresh or stats.numel == 1:
        return None
    if stats.constant and abs(stats.minimum - _MIMETIC_BIAS) > 0.05:
        # It trains, and badly; untouched Jamba (0) and Bamba (1) start so.
        step = math.log1p(math.exp(min(stats.minimum, 50.0)))
        return "warning", f"all {stats.minimum:.3g}: every step is {step:.3g}", _STEP, remedy
    if not stats.constant and (stats.maximum > 3 or (stats.mean > -0.5 and stats.std < 0.3)):
        return "warning", f"mean {stats.mean:.2g}, up to {stats.maximum:.3g}", _STEP, remedy
    return None


def _skip(stats: TensorStats, *, trained: bool) -> Verdict:
    remedy = "set it to one after everything that initialises: it adds the layer's own input to what the state gives"
    if stats.magnitude > 10:
        return "error" if stats.magnitude > 100 else "warning", f"reaches {stats.magnitude:.3g}", _SKIP, remedy
    if not trained and stats.constant and stats.numel > 1 and stats.minimum != 1:
        return "warning", f"all {stats.minimum:.3g}", _SKIP, remedy
    return None
