"""Normalisation: gains that are not neutral, running statistics that are wrong, weight norm without length."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from espalier.doctor.finding import Finding
from espalier.doctor.patient import Patient
from espalier.doctor.record import Record
from espalier.doctor.registry import register_check
from espalier.init.trained import drawn_around_zero

_TORCH = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@register_check("normalisation")
def normalisation(patient: Patient) -> Iterator[Finding]:
    """A gain that does not leave the normalised values as they are: drawn from noise, zero everywhere, or far from one.

    A zero gain is usual at the end of a residual branch, in every block; it is an error where every gain of the model
    is zero and the class multiplies by it, and a warning where siblings are not zero or there is no block. Whether a
    class multiplies by w or by 1 + w (Gemma) is read off a forward pass.
    """
    gains = [r for r in patient.records if r.role == "norm" and r.stats is not None and not r.stats.nonfinite]
    closed = [r for r in gains if r.stats is not None and r.stats.constant and r.stats.minimum == 0]
    all_closed = bool(closed) and len(closed) == len(gains)
    shifted: dict[type, bool | None] = {}
    for record in gains:
        stats = record.stats
        assert stats is not None
        if stats.constant and stats.minimum == 1.0:
            cls = type(record.module)
            if shifted.setdefault(cls, _adds_one(record)):
                yield _finding("warning", record, "the gain is 1 + 1", "set the weight to 0: this class adds one to it")
        elif stats.constant and stats.minimum == 0.0:
            adds_one = shifted.setdefault(type(record.module), _adds_one(record))
            if all_closed and adds_one is False:
                yield _finding("error", record, "every gain of the model is zero", "set it to one")
            elif adds_one is not True and patient.alone(record):
                yield _finding("warning", record, "zero, and its siblings are not", "set it to one")
            elif adds_one is False and record.pattern == record.name:
                bias = patient.find(f"{record.layer}.bias")
                if bias is None or bias.stats is None or bias.stats.magnitude == 0:
                    yield _finding("warning", record, "zero, in no branch that repeats", "set it to one")
        elif stats.constant and not patient.trained and not 0.05 <= abs(stats.minimum) <= 4:
            yield _finding("note", record, f"the gain is {stats.minimum:.3g}", "set it to one, unless it is meant")
        elif not stats.constant and stats.numel >= 8 and drawn_around_zero(stats.mean, stats.std):
            adds_one = shifted.setdefault(type(record.module), _adds_one(record))
            if adds_one is not True:
                yield _finding(
                    "warning", record,
                    f"drawn from noise, mean {stats.mean:.2g}, deviation {stats.std:.2g}",
                    "set it to one: something initialised it like a weight",
                )  # fmt: skip


def _finding(severity: str, record: Record, measured: str, remedy: str) -> Finding:
    return Finding(severity, record.name, "normalisation", measured, "a gain of one", remedy)  # type: ignore[arg-type]


@torch.no_grad()
def _adds_one(record: Record) -> bool | None:
    """Return whether a normalisation class multiplies by 1 + w rather than w; ``None`` where it cannot be told.

    The class itself is asked, with gains of zero and of one and without biases: w·x̂ gives 0 and x̂, (1 + w)·x̂ gives
    x̂ and 2·x̂, whatever x̂ is.
    """
    module = record.module
    if module is None or type(module) in _TORCH:
        return False if module is not None else None
    if module._buffers or module._modules or len(record.shape) != 1 or record.meta:
        return None
    if any(parameter is not None and hasattr(parameter, "to_local") for parameter in module._parameters.values()):
        return None
    weight = module._parameters[record.leaf]
    assert weight is not None
    wave = torch.linspace(-1, 1, record.shape[0], dtype=torch.float32, device=weight.device)
    x = (wave + wave.square()).expand(1, 2, -1).contiguous().to(weight.dtype)
    blank = {name: torch.zeros_like(own) for name, own in module._parameters.items() if own is not None}
    try:
        zero, one = (
            torch.func.functional_call(module, blank | {record.leaf: torch.full_like(weight, gain)}, (x,)).float()
            for gain in (0.0, 1.0)
        )
    except Exception:  # a class of its own may want other arguments: then nothing is known, and nothing is said
        return None
    if not zero.any():
        return False if one.any() else None
    return True if torch.allclose(one, 2 * zero, rtol=0.02) else None


@register_check("batch-norm")
def batch_norm(patient: Patient) -> Iterator[Finding]:
    """Running variances that are not positive, or statistics that were never updated under trained weights."""
    for record in patient.records:
        stats = record.stats
        if record.role != "statistics" or stats is None or record.leaf != "running_var":
            continue
        if stats.minimum < 0 or (stats.constant and stats.maximum == 0):
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
    for record in patient.records:
        stats = record.stats
        if stats is None or stats.nonfinite:
            continue
        if record.role == "gain" and stats.zeros:
            yield Finding(
                "error", record.name, "weight-norm", f"{stats.zeros} of {stats.numel} lengths are zero",
                "the norms of the directions", "set g to the norm of v: with g = 0 v gets no gradient",
            )  # fmt: skip
        elif record.leaf in ("weight_v", "original1") and stats.constant and stats.minimum == 0:
            yield Finding(
                "error", record.name, "weight-norm", "every direction is zero", "noise",
                "draw v before weight norm is applied: 0/0 is NaN",
            )  # fmt: skip
