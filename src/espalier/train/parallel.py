"""One process or many: where they come from, how they share a model, and what they must agree on."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor, nn

from espalier.errors import EspalierError, require, require_known
from espalier.recipes.base import Recipe

Strategy = Literal["ddp", "fsdp2"]
"""Whole copies of the model in every process, or each process a shard of every parameter."""

T = TypeVar("T")


_COUNTS = (
    "JSM_NAMESPACE_RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "RANK", "SLURM_PROCID", "SLURM_STEP_NUM_NODES",
    "SLURM_STEP_NUM_TASKS", "WORLD_SIZE",
)  # fmt: skip
"""What launchers set, and Fabric reads when it is imported."""


class Launch(NamedTuple):
    """Who started this process, which of how many it is, and how many of them share its machine."""

    by: Literal["torchrun", "srun", ""]
    rank: int = 0
    processes: int = 1
    here: int = 1


def launched() -> Launch:
    """Return how this process was started, as its environment says; a RANK without a launcher means nothing.

    Raises:
        EspalierError: a variable of a launcher that is no whole number.
    """
    counts: dict[str, int] = {}
    for name in _COUNTS:
        text = os.environ.get(name, "")
        if text and not (text.isascii() and text.isdigit()):
            raise EspalierError(f"the environment says {name}={text}: unset it, or give a whole number from 0")
        counts[name] = int(text or 0)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return Launch("torchrun", counts["RANK"], counts["WORLD_SIZE"] or 1, counts["LOCAL_WORLD_SIZE"] or 1)
    if (tasks := counts["SLURM_STEP_NUM_TASKS"]) > 1:  # set by srun alone, not for the batch script around it
        return Launch("srun", counts["SLURM_PROCID"], tasks, tasks // (counts["SLURM_STEP_NUM_NODES"] or 1))
    return Launch("")


def make_fabric(recipe: Recipe, strategy: Strategy) -> Any:
    """Return the Fabric of this process: alone, or one of those that torchrun or srun started.

    Raises:
        EspalierError: an unknown strategy, shards in one process, or a batch that the processes cannot share evenly;
            or as ``launched``.
    """
    require_known("strategy", strategy, get_args(Strategy))
    by, _, processes, devices = launched()
    environments = require("lightning_fabric.plugins.environments", "train")
    if by == "torchrun":
        plugin = environments.TorchElasticEnvironment()
    elif by == "srun":
        os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(devices))  # Fabric insists
        plugin = environments.SLURMEnvironment()
    else:
        # A trial is one process; the plain environment keeps Fabric from taking a Slurm job's shape for its own.
        plugin = environments.LightningEnvironment()
        plugin.set_global_rank(0)  # whatever RANK was left in the environment
    if strategy == "fsdp2" and processes == 1:
        raise EspalierError("strategy 'fsdp2' shards a model over several processes: start them with torchrun or srun")
    if recipe.batch_size % (processes * recipe.accumulate):
        raise EspalierError(
            f"batch_size {recipe.batch_size} cannot be shared evenly by {processes} processes in parts of "
            f"accumulate {recipe.accumulate}: choose a multiple of {processes * recipe.accumulate}"
        )
    how: Any = "auto" if processes == 1 else strategy
    if strategy == "fsdp2":
        how = require("lightning_fabric.strategies", "train").ModelParallelStrategy(_shard, processes, 1)
    # Once lightning.pytorch was imported, Fabric's remarks go to a logger of its own there.
    with _quiet("lightning_fabric"), _quiet("lightning.pytorch"):
        fabric = require("lightning_fabric", "train").Fabric(
            devices=devices,
            num_nodes=processes // devices,
            strategy=how,
            precision={"32": "32-true", "bf16": "bf16-mixed"}[recipe.precision],
            plugins=[plugin],
        )
        if processes > 1:
            fabric.launch()
    return fabric


def synchronise_batch_norms(model: nn.Module, fabric: Any) -> nn.Module:
    """Let batch norms measure the whole batch where processes share it, and return the model.

    torch's layer for that runs on GPUs only; on a CPU the norms of the model get a forward pass of their own.
    """
    if fabric.world_size == 1:
        return model
    if fabric.device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            # A subclass in place, so that whoever asks for the kind of norm still finds it.
            module.__class__ = type(f"Global{type(module).__name__}", (_GlobalBatchNorm, type(module)), {})
    return model


class _GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm with the mean and the variance of all processes' examples together."""

    def forward(self, input: Tensor) -> Tensor:
        from torch.distributed.nn.functional import all_reduce

        if not self.training and self.running_mean is not None:
            return super().forward(input)
        x = input.float()
        over = [axis for axis in range(x.dim()) if axis != 1]
        shape = [-1 if axis == 1 else 1 for axis in range(x.dim())]
        count = all_reduce(x.new_tensor(float(x.numel() // x.shape[1])))
        mean_C = all_reduce(x.sum(over)) / count
        centred = x - mean_C.view(shape)
        # Two passes: the difference of two large sums would lose the variance of a channel far from zero.
        variance_C = all_reduce(centred.square().sum(over)) / count
        mean, variance, batches = self.running_mean, self.running_var, self.num_batches_tracked
        if self.training and mean is not None and variance is not None and batches is not None:
            with torch.no_grad():
                batches.add_(1)
                momentum = 1.0 / batches.item() if self.momentum is None else self.momentum
                mean.lerp_(mean_C, momentum)
                variance.lerp_(variance_C * count / (count - 1), momentum)
        result = centred * torch.rsqrt(variance_C + self.eps).view(shape)
        if self.affine:
            result = result * self.weight.view(shape) + self.bias.view(shape)
        return result.to(input.dtype)


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's state on the CPU, its shards put together one at a time; every process calls it."""
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    return {name: (part.full_tensor() if hasattr(part, "full_tensor") else part).cpu() for name, part in state.items()}


def local_part(tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor, or the tensor; both share memory with it."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def rank_and_world() -> tuple[int, int]:
    """Return which of the processes of a run this one is, and how many there are."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def gather_objects(mine: T) -> list[T]:
    """Return what every process holds, in their order; ``[mine]`` where there is but one."""
    found: list[T] = [mine] * rank_and_world()[1]
    if len(found) > 1:
        torch.distributed.all_gather_object(found, mine)
    return found


def first_of_any(reason: str | None) -> str | None:
    """Return the first process's reason that is not None, the same everywhere: what one finds, all act upon."""
    return next((each for each in gather_objects(reason) if each is not None), None)


def _shard(model: nn.Module, mesh: Any) -> nn.Module:
    """Shard the blocks of a model one by one, so that one of them is whole at a time, then what is left of it."""
    from torch.distributed.fsdp import fully_shard

    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    done: set[int] = set()
    for module in model.modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        for block in module:
            inside = {id(part) for part in block.modules()}
            parameters = Counter(id(p) for part in block.modules() for p in part.parameters(recurse=False))
            shared = any(owners[key] != count for key, count in parameters.items())
            if parameters and not shared and not inside & done and not isinstance(block, nn.ModuleList):
                fully_shard(block, mesh=mesh["data_parallel"])
                done |= inside
    # Whole weights that outlived a forward pass would be used again after the averaged ones were swapped in.
    fully_shard(model, mesh=mesh["data_parallel"], reshard_after_forward=True)
    return model


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)
