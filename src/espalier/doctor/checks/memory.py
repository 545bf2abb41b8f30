"""Is there anything in the tensors at all, and did anybody write it?"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from espalier.doctor.finding import Finding, Severity
from espalier.doctor.patient import Patient
from espalier.doctor.record import Record
from espalier.doctor.registry import register_check
from espalier.doctor.stats import HUGE


@register_check("not-finite", scope="tensor")
def not_finite(record: Record, patient: Patient) -> Iterator[Finding]:
    """NaN or infinity. Buffers may hold −∞, as causal masks do, and +∞ as an open bound."""
    stats = record.stats
    if stats is None or not stats.nonfinite:
        return
    assert record.values is not None
    nan = int(torch.isnan(record.values).sum())
    if record.buffer and not nan and record.role not in ("statistics", "position"):
        return
    kinds = ", ".join(
        f"{count:,} {kind}" for count, kind in ((nan, "NaN"), (stats.nonfinite - nan, "infinite")) if count
    )
    remedy = "initialise it again in float32, then cast"
    if record.leaf == "A_log":
        remedy = "draw A in float32 and away from zero before the logarithm, then cast"
    yield Finding("error", record.name, "not-finite", f"{kinds} of {stats.numel:,}", "finite numbers", remedy)


@register_check("uninitialised", scope="model")
def uninitialised(patient: Patient) -> Iterator[Finding]:
    """Bits that no start writes: magnitudes under 1e-30 or over 1e10, as in memory that was only allocated.

    Weight decay drives dead units of trained nets below 1e-30, so that in trained weights only huge magnitudes count.
    Structured depthwise filters are that small at their rim.
    """
    for record in patient.records:
        stats = record.stats
        if stats is None or record.dtype == torch.float16:
            continue
        # Masks hold the most negative number on purpose.
        largest = stats.maximum if record.buffer else stats.magnitude
        if largest > HUGE and not (record.buffer and stats.minimum >= 0 and stats.distinct <= 2):
            measured, severe = f"magnitudes up to {largest:.3g}", True
        elif stats.tiny > stats.sampled * (0.5 if record.filters else 0.001) and not patient.trained:
            measured, severe = f"{stats.tiny / stats.sampled:.1%} of its entries under 1e-30", not record.buffer
        else:
            continue
        yield Finding(
            "error" if severe or record.role == "position" else "warning",
            record.name,
            "uninitialised",
            measured,
            "magnitudes between 1e-6 and 10",
            "it was allocated (torch.empty, to_empty) and never written: call the module's own initialisation",
        )


@register_check("empty", scope="model")
def empty(patient: Patient) -> Iterator[Finding]:
    """No storage (meta device), no entries (ZeRO-3 outside its gather), or not built yet (lazy modules)."""
    for record in patient.records:
        severity: Severity = "error"
        if record.meta:
            lazy = record.module is not None and any(
                nn.parameter.is_lazy(t) for t in record.module._parameters.values() if t is not None
            )
            measured = "a lazy parameter" if lazy else "on the meta device"
            remedy = "run one forward pass first" if lazy else "call to_empty(device=…), then initialise or load"
        elif 0 in record.shape and not record.buffer:
            measured, remedy = f"shape {tuple(record.shape)}", "give it a size, or gather it first"
            own = {} if record.module is None else record.module._parameters
            tensor = own.get(record.leaf)
            # ZeRO-3 leaves one dimension of zero; a configuration that asks for no registers or no points, a zero
            # among others, in the bias beside such a weight one alone.
            asked = any(t is not None and t.ndim > 1 and 0 in t.shape for t in own.values())
            if hasattr(tensor, "ds_id"):
                remedy = "diagnose inside deepspeed.zero.GatheredParameters(model.parameters())"
            elif asked or len(record.shape) > 1:
                severity = "note"
        else:
            continue
        yield Finding(severity, record.name, "empty", measured, "numbers", remedy)
