"""Normalisation: gains that are not neutral, running statistics that are wrong, weight norm without length."""

from __future__ import annotations

from espalier.doctor.asked import adds_one
from espalier.doctor.patient import Patient, Record
from espalier.doctor.registry import Verdict, judges
from espalier.doctor.stats import TensorStats
from espalier.init.trained import drawn_around_zero

_ONE = "a gain of one"


@judges("normalisation")
def normalisation(record: Record, stats: TensorStats, patient: Patient) -> Verdict:
    """A gain that does not leave the normalised values as they are: drawn from noise, zero everywhere, or far from one.

    A zero gain is usual at the end of a residual branch, in every block; it is an error where every gain of the model
    is zero and the class multiplies by it, and a warning where siblings are not zero or there is no block. Whether a
    class multiplies by w or by 1 + w (Gemma) is read off a forward pass.
    """
    if record.role != "norm" or stats.nonfinite:
        return None
    if stats.closed:
        return _closed(record, patient)
    if not stats.constant:
        if (
            stats.numel < 8
            or not drawn_around_zero(stats.mean, stats.std, stats.numel)
            or adds_one(record.module, record.leaf)
        ):
            return None
        measured = f"drawn from noise, mean {stats.mean:.2g}, deviation {stats.std:.2g}"
        return "warning", measured, _ONE, "set it to one: something initialised it like a weight"
    if stats.minimum == 1 and adds_one(record.module, record.leaf):
        return "warning", "the gain is 1 + 1", _ONE, "set the weight to 0: this class adds one to it"
    if patient.trained or 0.05 <= abs(stats.minimum) <= 4:
        return None
    return "note", f"the gain is {stats.minimum:.3g}", _ONE, "set it to one, unless it is meant"


def _closed(record: Record, patient: Patient) -> Verdict:
    shifted, remedy = adds_one(record.module, record.leaf), "set it to one"
    gains = (stats for r, stats in patient.measured() if r.role == "norm" and not stats.nonfinite)
    if shifted is False and all(stats.closed for stats in gains):
        return "error", "every gain of the model is zero", _ONE, remedy
    if not shifted and patient.alone(record):
        return "warning", "zero, and its siblings are not", _ONE, remedy
    bias = patient.find(f"{record.layer}.bias")
    speaks = bias is not None and bias.stats is not None and bias.stats.magnitude != 0
    if shifted is False and record.pattern == record.name and not speaks:
        return "warning", "zero, in no branch that repeats", _ONE, remedy
    return None


@judges("batch-norm")
def batch_norm(record: Record, stats: TensorStats, patient: Patient) -> Verdict:
    """Running variances that are not positive, or statistics that were never updated under trained weights."""
    if record.leaf != "running_var":
        return None
    if stats.minimum < 0 or stats.closed:
        remedy = "reset_running_stats(), or load them again: evaluation divides by their root"
        return "error", f"running variances down to {stats.minimum:.3g}", "positive", remedy
    if patient.trained and stats.constant and stats.numel >= 8:
        remedy = "run some batches in training mode, or save the buffers with the weights"
        return "warning", f"all {stats.minimum:.3g} beside trained weights", "statistics of the data", remedy
    return None


@judges("weight-norm")
def weight_norm(record: Record, stats: TensorStats, patient: Patient) -> Verdict:
    """A length g of zero: the weight is zero, and its direction gets no gradient; a zero direction v gives NaN."""
    if record.role == "gain" and stats.zeros and not stats.nonfinite:
        remedy = "set g to the norm of v: with g = 0 v gets no gradient"
        return "error", f"{stats.zeros} of {stats.numel} lengths are zero", "the norms of the directions", remedy
    if record.leaf in ("weight_v", "original1") and stats.closed:
        return "error", "every direction is zero", "noise", "draw v before weight norm is applied: 0/0 is NaN"
    return None
