"""``diagnose``: read every tensor once, run every check, and probe with a batch if there is one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from espalier.doctor.diagnosis import Diagnosis
from espalier.doctor.patient import Patient
from espalier.doctor.probe import probe
from espalier.doctor.registry import CHECKS, SEVERITIES, Check, Finding
from espalier.doctor.sources import Source, open_module, open_weights
from espalier.errors import EspalierError
from espalier.init import StructureReport
from espalier.init.layouts.registry import BareCheckpoint
from espalier.init.sharded import reshard

# Where the checks are explained; the anchor is the check's name.
GUIDE = "guides/before-you-train.md"


@torch.no_grad()
def diagnose(
    model: nn.Module | str | Path,
    example: Any = None,
    optimizer: torch.optim.Optimizer | None = None,
    against: Any = None,
    *,
    heads: int | None = None,
) -> Diagnosis:
    """Say what is wrong with a model's weights before the first step, and what to do about it.

    The static checks read one tensor at a time. A sharded model (FSDP2, DTensor) is gathered tensor by tensor, and
    every rank must call; ranks are compared with each other if ``torch.distributed`` has several. Nothing is
    changed: with ``example`` the model runs forward and backward, and its parameters, gradients, buffers, attributes,
    mode and the random state are as before.

    Args:
        model: a module, or the path of a checkpoint: a ``.safetensors`` file, a sharded index, a folder of either, or a
            file that ``torch.save`` wrote. A checkpoint is streamed, and no code of it runs.
        example: a batch to probe with: what ``model(...)`` takes, as a tensor, a mapping of keyword arguments, or
            (inputs, labels); ``"synthetic"`` makes one from the model's own configuration; ``None`` does not probe.
        optimizer: the optimiser that is to train the model: are all parameters in it, and are they still the model's?
        against: an earlier ``StructureReport`` (did the structure survive?), or what the model should hold, as a
            state dictionary or the path of a checkpoint.
        heads: query heads of a bare checkpoint, where no config.json beside it says so.

    Returns:
        The findings, most severe first; ``print`` shows a table, ``exit_status()`` is what a script gates on.

    Raises:
        EspalierError: the checkpoint cannot be read, or no example can be made for this model.
    """
    if isinstance(against, str | Path):
        against = open_weights(Path(against))
    elif against is not None and not isinstance(against, StructureReport | Mapping):
        raise EspalierError(f"against {type(against).__name__}: pass a StructureReport, a state dictionary or a path")
    elif isinstance(against, Mapping) and against and not any(isinstance(value, Tensor) for value in against.values()):
        raise EspalierError("against: holds no tensors by name: pass the state dictionary itself")
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        raise EspalierError(f"optimizer {type(optimizer).__name__}: pass the optimiser that is to train the model")
    patient, source = _admit(model, heads)
    patient.optimizer, patient.against = optimizer, against
    found: list[tuple[Check, Finding]] = []
    numbers = 0
    for record in map(source.record, source):
        if record.values is not None:
            numbers += record.values.numel()
            found += [(c, f) for c in CHECKS.values() if c.scope == "tensor" for f in c.function(record, patient)]
        # Only the numbers are kept: a whole model need not fit into memory.
        patient.records.append(replace(record, values=None))
    patient = replace(patient)  # what a check of single tensors asked it was answered from those read until then
    found += [(c, f) for c in CHECKS.values() if c.scope == "model" for f in c.function(patient)]
    kept = [finding for check, finding in found if not (check.fresh_only and patient.trained)]
    if example is not None:
        if patient.model is None or isinstance(patient.model, BareCheckpoint):
            raise EspalierError("example: a bare checkpoint has no code to run: give the model itself to probe it")
        kept = probe(patient, example, kept)
    kept = [f if f.page else replace(f, page=f"{GUIDE}#{f.check}") for f in kept]
    kept.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return Diagnosis(tuple(kept), len(patient.records), numbers, patient.trained)


def _admit(model: nn.Module | str | Path, heads: int | None) -> tuple[Patient, Source]:
    module = model if isinstance(model, nn.Module) else None
    if module is not None:
        reshard(module)  # so that shards are what is read
        source = open_module(module)
    elif Path(str(model)).exists():
        source = open_weights(Path(str(model)))
    else:
        raise EspalierError(f"model {str(model)!r} is neither a module nor a path: name a checkpoint that exists")
    if heads is not None and (not isinstance(heads, int) or heads < 1):
        raise EspalierError(f"heads {heads}: give a whole number from 1")
    known = source.config.get("num_attention_heads") or source.config.get("n_head")
    heads = heads or (known if isinstance(known, int) else None)
    names = frozenset(source.names)
    return Patient(module, source.config, source.__getitem__, heads=heads, aliases=source.aliases, names=names), source
