"""Under ``torch.distributed``: replicas that differ from rank to rank, and shards that do not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from espalier.doctor.patient import Patient
from espalier.doctor.record import plain_name
from espalier.doctor.registry import Finding, register_check
from espalier.doctor.stats import measure

# Name, what the ranks are compared on, and whether the bits are noise.
Mark = tuple[str, str, bool]


@register_check("ranks")
def ranks(patient: Patient) -> Iterator[Finding]:
    """Replicated tensors have equal bits on every rank; shards of noise have different ones.

    Running statistics are not compared: each rank keeps its own between forward passes.

    Every rank must call; all get the same findings.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    world = torch.distributed.get_world_size() if distributed else 1
    if patient.model is None or world < 2:
        return
    everyone: list[Any] = [None] * world
    torch.distributed.all_gather_object(everyone, dict(_marks(patient.model)))
    # Names that some rank lacks belong to a stage of a pipeline.
    for name in (name for name in everyone[0] if all(name in marks for marks in everyone)):
        kinds, prints, noise = (set(column) for column in zip(*(marks[name] for marks in everyone), strict=True))
        if kinds == {"replica"} and len(prints) > 1:
            yield Finding(
                "error", name, "ranks", f"{len(prints)} different tensors on {world} ranks", "one, on every rank",
                "broadcast from rank 0 (DistributedDataParallel does), or seed every rank alike before building",
            )  # fmt: skip
        elif kinds == {"shard"} and len(prints) == 1 and noise == {True}:
            yield Finding(
                "error", name, "ranks", f"the same shard on {world} ranks", "different shards",
                "initialise before sharding, or with another seed on every rank",
            )  # fmt: skip


def _marks(model: nn.Module) -> Iterator[tuple[str, Mark]]:
    """Yield what this rank holds of every tensor: the fingerprint of its replica or of its shard."""
    from torch.distributed.tensor import DTensor, Shard

    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        own = name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")
        if own or tensor.is_meta or nn.parameter.is_lazy(tensor):
            continue
        # Megatron and FSDP1 keep shards as ordinary tensors that say so.
        if getattr(tensor, "tensor_model_parallel", False) or "FlatParam" in type(tensor).__name__:
            continue
        kind, local = "replica", tensor.detach()
        if isinstance(tensor, DTensor):
            split = any(isinstance(placement, Shard) for placement in tensor.placements)
            kind, local = "shard" if split else "replica", tensor.to_local().detach()
        if not local.numel():
            continue
        if local.is_floating_point():
            stats = measure(local)
            yield plain_name(name), (kind, stats.fingerprint, stats.noise)
        elif kind == "replica":
            yield plain_name(name), (kind, str(int(local.long().sum())), False)
