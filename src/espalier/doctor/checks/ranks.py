"""Under ``torch.distributed``: replicas that differ from rank to rank, and shards that do not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from espalier.doctor.finding import Finding
from espalier.doctor.patient import Patient
from espalier.doctor.record import plain_name
from espalier.doctor.registry import register_check
from espalier.doctor.stats import measure

# Name, what the ranks are compared on, and whether the bits are noise.
Mark = tuple[str, str, bool]


@register_check("ranks")
def ranks(patient: Patient) -> Iterator[Finding]:
    """Replicated tensors have equal bits on every rank; shards of noise have different ones.

    Running statistics are not compared: each rank keeps its own between forward passes.

    Every rank must call; all get the same findings.
    """
    distributed = torch.distributed
    if patient.model is None or not (distributed.is_available() and distributed.is_initialized()):
        return
    world = distributed.get_world_size()
    if world < 2:
        return
    everyone: list[Any] = [None] * world
    distributed.all_gather_object(everyone, dict(_marks(patient.model)))
    # Names that some rank lacks belong to a stage of a pipeline.
    for name in (name for name in everyone[0] if all(name in marks for marks in everyone)):
        kind = {marks[name][0] for marks in everyone}
        prints = {marks[name][1] for marks in everyone}
        if kind == {"replica"} and len(prints) > 1:
            yield Finding(
                "error", name, "ranks", f"{len(prints)} different tensors on {world} ranks", "one, on every rank",
                "broadcast from rank 0 (DistributedDataParallel does), or seed every rank alike before building",
            )  # fmt: skip
        elif kind == {"shard"} and len(prints) == 1 and all(marks[name][2] for marks in everyone):
            yield Finding(
                "error", name, "ranks", f"the same shard on {world} ranks", "different shards",
                "initialise before sharding, or with another seed on every rank",
            )  # fmt: skip


def _marks(model: nn.Module) -> Iterator[tuple[str, Mark]]:
    """Yield what this rank holds of every tensor: the fingerprint of its replica or of its shard."""
    from torch.distributed.tensor import DTensor, Shard

    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked"):
            continue
        if tensor.is_meta or nn.parameter.is_lazy(tensor):
            continue
        # Megatron and FSDP1 keep shards as ordinary tensors that say so.
        private = getattr(tensor, "tensor_model_parallel", False) or "FlatParam" in type(tensor).__name__
        if private:
            continue
        kind, local = "replica", tensor.detach()
        if isinstance(tensor, DTensor):
            split = [isinstance(placement, Shard) for placement in tensor.placements]
            kind, local = ("shard" if any(split) else "replica"), tensor.to_local().detach()
        if not local.numel():
            continue
        if local.is_floating_point():
            stats = measure(local)
            yield plain_name(name), (kind, stats.fingerprint, stats.noise)
        elif kind == "replica":
            yield plain_name(name), (kind, str(int(local.long().sum())), False)
