"""Normalisation: gains that are not neutral, running statistics that are wrong, weight norm without length."""

from __future__ import annotations

from collections.abc import Iterator

from espalier.doctor.asked import adds_one
from espalier.doctor.patient import Patient
from espalier.doctor.record import Record
from espalier.doctor.registry import Finding, Verdict, register_check
from espalier.doctor.stats import TensorStats
from espalier.init.trained import drawn_around_zero


@register_check("normalisation")
def normalisation(patient: Patient) -> Iterator[Finding]:
    """A gain that does not leave the normalised values as they are: drawn from noise, zero everywhere, or far from one.

    A zero gain is usual at the end of a residual branch, in every block; it is an error where every gain of the model
    is zero and the class multiplies by it, and a warning where siblings are not zero or there is no block. Whether a
    class multiplies by w or by 1 + w (Gemma) is read off a forward pass.
    """
    gains = [(r, stats) for r, stats in patient.measured() if r.role == "norm" and not stats.nonfinite]
    all_closed = all(stats.closed for _, stats in gains)
    for record, stats in gains:
        verdict = _closed(record, patient, all_closed) if stats.closed else _gain(record, stats, patient.trained)
        if verdict is not None:
            severity, measured, remedy = verdict
            yield Finding(severity, record.name, "normalisation", measured, "a gain of one", remedy)


def _closed(record: Record, patient: Patient, everywhere: bool) -> Verdict:
    shifted = adds_one(record)
    if everywhere and shifted is False:
        return "error", "every gain of the model is zero", "set it to one"
    if not shifted and patient.alone(record):
        return "warning", "zero, and its siblings are not", "set it to one"
    bias = patient.find(f"{record.layer}.bias")
    speaks = bias is not None and bias.stats is not None and bias.stats.magnitude != 0
    if shifted is False and record.pattern == record.name and not speaks:
        return "warning", "zero, in no branch that repeats", "set it to one"
    return None


def _gain(record: Record, stats: TensorStats, trained: bool) -> Verdict:
    if not stats.constant:
        if stats.numel < 8 or not drawn_around_zero(stats.mean, stats.std) or adds_one(record):
            return None
        measured = f"drawn from noise, mean {stats.mean:.2g}, deviation {stats.std:.2g}"
        return "warning", measured, "set it to one: something initialised it like a weight"
    if stats.minimum == 1 and adds_one(record):
        return "warning", "the gain is 1 + 1", "set the weight to 0: this class adds one to it"
    if trained or 0.05 <= abs(stats.minimum) <= 4:
        return None
    return "note", f"the gain is {stats.minimum:.3g}", "set it to one, unless it is meant"


@register_check("batch-norm")
def batch_norm(patient: Patient) -> Iterator[Finding]:
    """Running variances that are not positive, or statistics that were never updated under trained weights."""
    for record, stats in patient.measured():
        if record.leaf != "running_var":
            continue
        if stats.minimum < 0 or stats.closed:
            yield Finding(
                "error", record.name, "batch-norm", f"running variances down to {stats.minimum:.3g}", "positive",
                "reset_running_stats(), or load them again: evaluation divides by their root",
            )  # fmt: skip
        elif patient.trained and stats.constant and stats.numel >= 8:
            yield Finding(
                "warning", record.name, "batch-norm", f"all {stats.minimum:.3g} beside trained weights",
                "statistics of the data", "run some batches in training mode, or save the buffers with the weights",
            )  # fmt: skip


@register_check("weight-norm")
def weight_norm(patient: Patient) -> Iterator[Finding]:
    """A length g of zero: the weight is zero, and its direction gets no gradient; a zero direction v gives NaN."""
    for record, stats in patient.measured():
        if record.role == "gain" and stats.zeros and not stats.nonfinite:
            yield Finding(
                "error", record.name, "weight-norm", f"{stats.zeros} of {stats.numel} lengths are zero",
                "the norms of the directions", "set g to the norm of v: with g = 0 v gets no gradient",
            )  # fmt: skip
        elif record.leaf in ("weight_v", "original1") and stats.closed:
            yield Finding(
                "error", record.name, "weight-norm", "every direction is zero", "noise",
                "draw v before weight norm is applied: 0/0 is NaN",
            )  # fmt: skip
