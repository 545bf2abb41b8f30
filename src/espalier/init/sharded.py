"""Sharded models (FSDP2, DTensor): whole weights while a layer is looked at, shards again afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

from espalier.errors import EspalierError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@contextmanager
def whole(module: nn.Module, *, shapes: bool = False) -> Iterator[None]:
    """Give a module whole parameters in place of its shards for the length of a ``with`` block.

    Every rank must enter: gathering and writing back are collective. Parameters that were written to inside the block
    are sharded again from rank 0's values, so that ranks cannot drift apart; after an exception nothing is written.

    Args:
        module: any module; without shards in it nothing happens.
        shapes: gather nothing, give parameters without storage (on the meta device).

    Raises:
        EspalierError: a placement other than ``Shard`` and ``Replicate`` (parameters written before it was applied
            need no gathering).
    """
    shards = [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if _is_sharded(parameter)
    ]
    if not shards:
        yield
        return
    full = {id(shard): _gather(shard, shapes) for _, _, shard in shards}
    before = {key: parameter._version for key, parameter in full.items()}
    try:
        for owner, name, shard in shards:
            owner._parameters[name] = full[id(shard)]
        yield
    finally:
        for owner, name, shard in shards:
            owner._parameters[name] = shard  # type: ignore[assignment]
    for shard in {id(shard): shard for _, _, shard in shards}.values():
        if full[id(shard)]._version != before[id(shard)]:
            _scatter(full[id(shard)], shard)


def reshard(model: nn.Module) -> None:
    """Free the whole parameters that FSDP2 keeps after a forward pass: what is written to those is thrown away."""
    if not is_distributed():
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def agree(seeds: Sequence[int], model: nn.Module) -> list[int]:
    """Return rank 0's seeds on every rank of a model that is sharded or inside DDP, the given ones on any other."""
    shared = list(seeds)
    if not is_distributed():
        return shared
    replicas = [part for part in model.modules() if isinstance(part, nn.parallel.DistributedDataParallel)]
    if replicas or any(map(_is_sharded, model.parameters())):
        group = replicas[0].process_group if replicas else None
        torch.distributed.broadcast_object_list(shared, group=group, group_src=0)
    return shared


def is_distributed() -> bool:
    """Return whether this is one process of several that talk to each other."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _is_sharded(parameter: Tensor | None) -> TypeGuard[DTensor]:
    # Without a process group there are no shards, and then the import below is not paid for.
    if parameter is None or not is_distributed():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor)


def _gather(shard: DTensor, shapes: bool) -> nn.Parameter:
    with torch.inference_mode(False):  # whose tensors count no versions, by which a write is known
        if shapes or shard.device.type == "meta":
            tensor = torch.empty(shard.shape, dtype=shard.dtype, device="meta")
        else:
            tensor = shard.full_tensor().detach()
        return nn.Parameter(tensor, requires_grad=False)


@torch.no_grad()
def _scatter(full: Tensor, shard: DTensor) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    if any(type(placement) not in (Shard, Replicate) for placement in shard.placements):
        raise EspalierError(
            f"placements {shard.placements}: only Shard and Replicate can be written: "
            "structure the model before it is sharded"
        )
    shard.to_local().copy_(distribute_tensor(full.detach(), shard.device_mesh, shard.placements).to_local())
