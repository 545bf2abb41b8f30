"""Against what was there before: structure that a report recorded, or weights that a checkpoint holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from espalier.doctor.patient import Patient
from espalier.doctor.registry import Finding, register_check
from espalier.errors import EspalierError
from espalier.init import StructureReport, audit


@register_check("structure")
def structure(patient: Patient) -> Iterator[Finding]:
    """Layers that carried structure in an earlier report and do not now."""
    if not isinstance(patient.against, StructureReport):
        return
    if patient.model is None:
        raise EspalierError("against: a report is compared with a module: open the checkpoint as one first")
    for row in audit(patient.model, against=patient.against).layers:
        usual = row.asked or "the structure that was written"
        if row.status == "lost":
            yield Finding(
                "error", row.layer, "structure", row.note or "the structure is gone", usual,
                "call structure_ after whatever drew these weights again",
            )  # fmt: skip
        elif row.status == "changed":
            yield Finding(
                "note", row.layer, "structure", row.note or "other bits than were written", usual,
                "usual after training or a cast",
            )  # fmt: skip


@register_check("overwritten")
def overwritten(patient: Patient) -> Iterator[Finding]:
    """Weights that are not those of a checkpoint that the model should hold: redrawn on load, or never loaded."""
    if not isinstance(patient.against, Mapping):
        return
    for record in patient.records:
        stored: torch.Tensor | None = None if record.meta else patient.against.get(record.name)
        if stored is None:
            continue
        if tuple(stored.shape) != record.shape:
            measured = f"shape {record.shape}, stored {tuple(stored.shape)}"
        else:
            own = patient.load(record.name)
            stored = stored.to(own.device, own.dtype)
            if torch.equal(own, stored):
                continue
            share = float((own != stored).float().mean())
            measured = f"{share:.0%} of its entries differ"
        yield Finding(
            "error", record.name, "overwritten", measured, "what the checkpoint holds",
            "load again last: something initialised it after it was loaded",
        )  # fmt: skip
    held = set(patient.against)
    for record in patient.records:
        names = {record.name, *patient.aliases.get(record.name, ())}
        if not record.buffer and names.isdisjoint(held):
            yield Finding(
                "warning", record.name, "overwritten", "not in the checkpoint", "stored",
                "it keeps its own start: is that meant?",
            )  # fmt: skip
