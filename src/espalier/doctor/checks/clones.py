"""Tensors that hold the very same noise without being tied: copies among layers."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from espalier.doctor.finding import Finding
from espalier.doctor.patient import Patient
from espalier.doctor.record import Record, pattern_of
from espalier.doctor.registry import register_check

# Averaged copies of a network start equal on purpose.
_COPIES = re.compile(
    r"teacher|momentum|(^|[._])ema([._]|$)|target|(^|[._])key_encoder|_m\.|shadow|averaged|reference_", re.IGNORECASE
)


@register_check("clones")
def clones(patient: Patient) -> Iterator[Finding]:
    """Two untied parameters with equal bits that look like noise: copied layers start, and partly stay, the same."""
    groups: dict[str, list[Record]] = {}
    for record in patient.records:
        stats = record.stats
        if stats is not None and record.matrix and stats.noise and record.role not in ("ssm", "position"):
            groups.setdefault(stats.fingerprint, []).append(record)
    for members in groups.values():
        if len(members) < 2:
            continue
        # The fingerprint is of a sample: look at every bit before saying so.
        first = patient.load(members[0].name)
        same = [m for m in members[1:] if torch.equal(first, patient.load(m.name))]
        if not same:
            continue
        names = [members[0].name, *(m.name for m in same)]
        frozen = any(not m.trainable for m in (members[0], *same)) and patient.model is not None
        if frozen or any(_COPIES.search(name) for name in names):
            severity, remedy = "note", "usual for an averaged or frozen copy; otherwise draw it again"
        else:
            siblings = len({pattern_of(name) for name in names}) == 1
            # Files keep tied weights twice.
            if patient.model is None and not siblings and _heads(names):
                continue
            severity = "error" if siblings or not _heads(names) else "warning"
            remedy = "draw every layer again (reset_parameters), or tie them if sharing is meant"
        for name in names[1:]:
            yield Finding(severity, name, "clones", f"equal to {names[0]}", "noise of its own", remedy)  # type: ignore[arg-type]


def _heads(names: list[str]) -> bool:
    return all(re.search(r"head|classifier|embed|pred", name, re.IGNORECASE) for name in names)
