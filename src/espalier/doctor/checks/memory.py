"""Is there anything in the tensors at all, and did anybody write it?"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress

import torch
from torch import nn

from espalier.doctor.patient import Patient, Record
from espalier.doctor.registry import Finding, Severity, Verdict, judges, register_check
from espalier.doctor.stats import HUGE, TensorStats
from espalier.init.layouts.scratch import leaves

_FREQUENCIES = re.compile(r"(^|[._])inv_freq$")
_WAVES = re.compile(r"(^|[._])(cos|sin)(_cached|_cache)?$|freqs_(cos|sin)$")
_IDS = re.compile(r"(position_ids|relative_position_index|relative_coords_index)$")


@judges("not-finite", scope="tensor")
def not_finite(record: Record, stats: TensorStats, patient: Patient) -> Verdict:
    """NaN or infinity. Buffers may hold −∞, as causal masks do, and +∞ as an open bound."""
    if not stats.nonfinite or record.values is None:
        return None
    nan = int(torch.isnan(record.values).sum())
    if record.buffer and not nan and record.role not in ("statistics", "position"):
        return None
    counts = {"NaN": nan, "infinite": stats.nonfinite - nan}
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in counts.items() if count)
    remedy = "initialise it again in float32, then cast"
    if record.leaf == "A_log":
        remedy = "draw A in float32 and away from zero before the logarithm, then cast"
    return "error", f"{kinds} of {stats.numel:,}", "finite numbers", remedy


@judges("uninitialised")
def uninitialised(record: Record, stats: TensorStats, patient: Patient) -> Verdict:
    """Bits that no start writes: magnitudes under 1e-30 or over 1e10, as in memory that was only allocated.

    Weight decay drives dead units of trained nets below 1e-30, so that in trained weights only huge magnitudes count.
    Structured depthwise filters are that small at their rim.
    """
    if record.dtype == torch.float16:
        return None
    # Masks hold the most negative number on purpose.
    largest = stats.maximum if record.buffer else stats.magnitude
    if largest > HUGE and not (record.buffer and stats.minimum >= 0 and stats.distinct <= 2):
        measured, severe = f"magnitudes up to {largest:.3g}", True
    elif stats.tiny > stats.sampled * (0.5 if record.filters else 0.001) and not patient.trained:
        measured, severe = f"{stats.tiny / stats.sampled:.1%} of its entries under 1e-30", not record.buffer
    else:
        return None
    remedy = "it was allocated (torch.empty, to_empty) and never written: call the module's own initialisation"
    severe = severe or record.role == "position"
    return "error" if severe else "warning", measured, "magnitudes between 1e-6 and 10", remedy


@register_check("empty")
def empty(patient: Patient) -> Iterator[Finding]:
    """No storage (meta device), no entries (ZeRO-3 outside its gather), or not built yet (lazy modules)."""
    for record in patient.records:
        own = {} if record.module is None else record.module._parameters
        beside = [tensor for tensor in own.values() if tensor is not None]
        severity: Severity = "error"
        if record.meta:
            measured, remedy = "on the meta device", "call to_empty(device=…), then initialise or load"
            if any(map(nn.parameter.is_lazy, beside)):
                measured, remedy = "a lazy parameter", "run one forward pass first"
        elif 0 in record.shape and not record.buffer:
            measured, remedy = f"shape {record.shape}", "give it a size, or gather it first"
            # ZeRO-3 leaves one dimension of zero; a configuration that asks for no registers or no points, a zero
            # among others, in the bias beside such a weight one alone.
            if hasattr(own.get(record.leaf), "ds_id"):
                remedy = "diagnose inside deepspeed.zero.GatheredParameters(model.parameters())"
            elif len(record.shape) > 1 or any(tensor.ndim > 1 and 0 in tensor.shape for tensor in beside):
                severity = "note"
        else:
            continue
        yield Finding(severity, record.name, "empty", measured, "numbers", remedy)


@register_check("unread")
def unread(patient: Patient) -> Iterator[Finding]:
    """Weights that no check could read: a note if they are no real numbers, a warning if they are packed away.

    An error where nothing else could be read either, complex numbers apart: those are trained as they are. And an error
    where there is nothing: of what was not read, nobody knows that it is healthy.
    """
    nothing = not any(True for _ in patient.measured())
    for record in patient.records:
        if record.stats is None and not (record.buffer or record.meta or 0 in record.shape):
            measured, remedy = f"{record.dtype} is not read", "look at them yourself, or diagnose them as real numbers"
            severity: Severity = "error" if nothing and not record.dtype.is_complex else "note"
            yield Finding(severity, record.name, "unread", measured, "real numbers", remedy)
    packed: list[str] = []
    for name, module in patient.model.named_modules() if patient.model is not None else ():
        # Modules that keep weights elsewhere than among parameters and buffers have to save them by themselves.
        own = type(module)._save_to_state_dict is not nn.Module._save_to_state_dict
        if not own or name.startswith(tuple(packed)):
            continue
        saved: dict[str, object] = {}
        with suppress(Exception):  # anyone's code
            module._save_to_state_dict(saved, "", False)
        elsewhere = saved.keys() - module._parameters.keys() - module._buffers.keys()
        if any(next(leaves(saved[key]), None) is not None for key in elsewhere):
            packed.append(f"{name}.".lstrip("."))
            measured, remedy = "packed weights are not read", "diagnose the model as it was before it was quantised"
            yield Finding("error" if nothing else "warning", name, "unread", measured, "parameters", remedy)
    if not (patient.records or packed):  # ``torch.jit.freeze`` makes constants of them
        remedy = "diagnose it with its weights, as it was before they became a part of its code"
        yield Finding("error", "(model)", "unread", "no tensor", "parameters", remedy)


@register_check("positions", scope="tensor")
def positions(record: Record, patient: Patient) -> Iterator[Finding]:
    """Tables that are computed, not learned, and lost when a model is built on the meta device and only emptied.

    Rotary frequencies fall from about one to above zero, cosines stay within ±2, position ids count.
    """
    values, name = record.values, record.name
    if values is None or (record.trainable and not record.buffer):
        return
    measured = usual = ""
    if _FREQUENCIES.search(name) and values.is_floating_point() and values.ndim == 1:
        if not _fall(values.float()):
            shown = ", ".join(f"{float(value):.3g}" for value in values[:3])
            measured, usual = f"{shown}, …", "1, falling towards 1/θ"
    elif _WAVES.search(name) and values.is_floating_point():
        largest = float(values.float().abs().max())
        # Scaled rotary embeddings (YaRN) multiply both by at most about 2.
        if not largest <= 4:
            measured, usual = f"magnitudes up to {largest:.3g}", "within ±1"
        elif largest == 0:
            measured, usual = "all zero", "cosines and sines"
    elif _IDS.search(name) and not values.is_floating_point() and values.dtype != torch.bool:
        low, high = int(values.min()), int(values.max())
        zeros = values.numel() > 1 and low == high == 0 and "position_ids" in name
        # Ids index a table: no model has a hundred million positions, and none counts downwards from zero.
        if low < -1 or high > 100_000_000 or zeros:
            measured, usual = f"from {low} to {high}", f"0 to {values.shape[-1] - 1}"
    if measured:
        remedy = "compute it again after to_empty or loading: it is not in the checkpoint"
        yield Finding("error", name, "positions", measured, usual, remedy)


def _fall(frequencies: torch.Tensor) -> bool:
    """Return whether rotary frequencies are in order and of a usual size."""
    if not torch.isfinite(frequencies).all():
        return False
    steps = frequencies.diff()
    # Images have a run of frequencies for each axis, so that the order may start again a few times.
    ordered = min(int((steps > 0).sum()), int((steps < 0).sum())) <= min(3, len(frequencies) // 4)
    # Partial rotations end in zeros; frequencies of pixels reach some hundred.
    return ordered and float(frequencies.min()) >= 0 and 1e-4 <= float(frequencies.max()) <= 1e4
