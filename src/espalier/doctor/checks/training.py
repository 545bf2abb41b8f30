"""What will be trained: frozen parameters, the optimiser's groups, and the row that padding reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import Tensor, nn

from espalier.doctor.patient import Patient, Record
from espalier.doctor.registry import Finding, Severity, Verdict, judges, register_check
from espalier.doctor.stats import TensorStats, root_mean_square
from espalier.init.matching import plain_name


@judges("padding-row", scope="tensor", fresh_only=True)
def padding_row(record: Record, stats: TensorStats, patient: Patient) -> Verdict:
    """The embedding row at ``padding_idx`` is zero: it gets no gradient, so noise there stays for good."""
    module, values = record.module, record.values
    if not isinstance(module, nn.Embedding) or module.padding_idx is None or record.leaf != "weight":
        return None
    if values is None or not stats.noise or record.role != "embedding" or not record.trainable:
        return None
    size = root_mean_square(values[module.padding_idx])
    if not size > 0:
        return None
    # Attention masks what was padded; means, convolutions and recurrences read it.
    masked = patient.model is not None and any("att" in type(m).__name__.lower() for m in patient.model.modules())
    remedy = "zero the row after initialising: it never gets a gradient"
    return "note" if masked else "warning", f"rms {size:.3g} in row {module.padding_idx}", "zero", remedy


@register_check("frozen")
def frozen(patient: Patient) -> Iterator[Finding]:
    """Parameters that want no gradient: all of them is an error when there is an optimiser."""
    if patient.model is None:
        return
    parameters = [r for r in patient.records if not r.buffer and not r.dtype.is_complex]
    still = [r for r in parameters if not r.trainable and r.dtype.is_floating_point]
    if not still:
        return
    everything = len(still) == len(parameters)
    first = ", ".join(record.name for record in still[:2]) + (", …" if len(still) > 2 else "")
    severity: Severity = "note" if not everything else "error" if patient.optimizer is not None else "warning"
    measured = f"{len(still)} of {len(parameters)} parameters want no gradient ({first})"
    remedy = "call requires_grad_(True) on what is to learn"
    yield Finding(severity, "" if everything else still[0].name, "frozen", measured, "all are trained", remedy)


@register_check("optimizer")
def optimizer(patient: Patient) -> Iterator[Finding]:
    """Every trainable parameter is in a group of the optimiser, and every parameter in a group is the model's."""
    if patient.optimizer is None or patient.model is None:
        return
    held = {id(p): p for group in patient.optimizer.param_groups for p in group["params"]}
    own = {id(p): (name, p) for name, p in patient.model.named_parameters()}
    strangers = [p for key, p in held.items() if key not in own]
    shapes = Counter(map(_shape_of, strangers))
    for key, (name, parameter) in own.items():
        if key in held or not parameter.requires_grad:
            continue
        shape = _shape_of(parameter)
        replaced = shapes[shape] > 0
        shapes[shape] -= replaced
        measured = "replaced after the optimiser was made" if replaced else "in no group of the optimiser"
        remedy = "make the optimiser after the last change to the model, from model.parameters()"
        yield Finding("error", plain_name(name), "optimizer", measured, "in one group", remedy)
    if strangers:
        measured = f"{len(strangers)} of its {len(held)} parameters are not the model's"
        remedy = "make the optimiser after to(), sharding, resizing and wrapping"
        yield Finding("error", "", "optimizer", measured, "none", remedy)


def _shape_of(parameter: Tensor) -> tuple[int, ...]:
    return () if nn.parameter.is_lazy(parameter) else tuple(parameter.shape)  # which has no shape to ask for
