"""The checkpoint that a stopped run goes on from, whatever number of processes and strategy wrote it."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from espalier.errors import EspalierError, told
from espalier.files import lock_of, read_object, write_json
from espalier.recipes.validation import from_values
from espalier.train.manifest import damaged, file_digest, read_manifest, write_manifest
from espalier.train.parallel import first_of_any, gather_objects, rank_and_world

Rows = list[dict[str, Any]]
"""The rows of metrics.jsonl."""

_CURRENT, _OLD, _PARTIAL, _STATE = "checkpoint", "checkpoint.old", "checkpoint.partial", "state.json"
_NUMBERS = {"step", "mu_product"}
"""What torch's Adam, AdamW and NAdam keep of a parameter in one number; all else is as large as the parameter."""

# Note [Two checkpoints]
# A new checkpoint is written as ``checkpoint.partial``, its manifest last. Then the oldest one is deleted, the present
# one becomes ``checkpoint.old`` and the new one takes its name. A kill at any instant leaves a complete one under one
# of the two names. What is damaged on disk later is told by its manifest, and the other one is used.
#
# Note [Tensors in safetensors]
# The tensors go through torch.distributed.checkpoint, each process writing its shards, so that a checkpoint can be read
# by another number of processes or another strategy. Its own format keeps an index that is unpickled, which runs
# whatever code it holds; its safetensors format does not.


@dataclass
class Counters:
    """Where a run stands: everything that a resumed one needs besides tensors."""

    epoch: int = 0
    """Completed epochs."""
    step: int = 0
    """Completed optimiser steps."""
    seconds: float = 0.0
    """Training time so far, evaluation excluded."""
    loss_sum: float = 0.0
    """Sum of the losses of the steps since the last row."""
    loss_steps: int = 0
    """Number of those steps."""


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: Optimizer,
    averages: Mapping[str, Tensor],
    counters: Counters,
    rows: Rows,
) -> None:
    """Make the present state the run's checkpoint and keep the one before (Note [Two checkpoints]).

    Every process calls it.

    Args:
        folder: the run folder.
        model: the bare model, sharded or whole.
        optimizer: its optimiser.
        averages: the averaged weights by name; empty where none are kept.
        counters: where the run stands.
        rows: that belong to this state.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    partial, (rank, world) = folder / _PARTIAL, rank_and_world()
    if rank == 0:
        _remove(partial)
        partial.mkdir()
    try:
        first_of_any(None)  # nobody writes before the folder is there
        writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
        with _plain_errors():
            # safetensors takes no other strides, such as those of channels-last weights.
            tensors = {name: tensor.contiguous() for name, tensor in _tensors(model, optimizer, averages).items()}
            dcp.save(tensors, storage_writer=writer, no_dist=world == 1)
        if rank == 0:
            names = {id(p): name for name, p in model.named_parameters()}
            states = {names[id(p)]: sorted(state) for p, state in optimizer.state.items()}
            content = {"counters": asdict(counters), "rows": rows, "optimizer": states, "averages": bool(averages)}
            write_json(partial / _STATE, content)
        first_of_any(None)
        files = sorted(path.name for path in partial.iterdir())[rank::world]
        digests = gather_objects({name: [file_digest(partial / name)] for name in files})
        if rank == 0:
            write_manifest(partial, {name: value for each in digests for name, value in each.items()})
            _remove(folder / _OLD)
            if (folder / _CURRENT).exists():
                os.rename(folder / _CURRENT, folder / _OLD)
            os.rename(partial, folder / _CURRENT)
    except BaseException:
        if rank == 0:
            recover(folder)
        raise
    first_of_any(None)


def load_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: Optimizer,
    averages: Mapping[str, Tensor],
    steps_per_epoch: int,
) -> tuple[Counters, Rows]:
    """Load the run's newest undamaged checkpoint, in place, once ``recover`` has cleared up; every process calls it.

    Args:
        folder: the run folder.
        model: the bare model, on its devices.
        optimizer: its optimiser.
        averages: tensors for the averaged weights by name; empty where none are kept.
        steps_per_epoch: of the run.

    Returns:
        Where the run stood, and its rows: at its start where there is no checkpoint yet.

    Raises:
        EspalierError: every checkpoint is damaged, or this one is not of this model.
    """
    rank, _ = rank_and_world()
    if rank == 0:
        recover(folder)
    first_of_any(None)
    reasons: list[str] = []
    for name in (_CURRENT, _OLD):
        if not (folder / name).exists():
            continue
        if (reason := first_of_any(_damage(folder / name))) is None:
            if rank == 0 and name == _OLD:
                # The damaged one must not become the one that is kept beside the next.
                _remove(folder / _CURRENT)
                recover(folder)
            first_of_any(None)
            counters, rows = _load(folder / _CURRENT, model, optimizer, averages, steps_per_epoch)
            if reasons and rank == 0:
                warnings.warn(
                    f"{reasons[0]}: the run goes on from the checkpoint before it, at step {counters.step}",
                    stacklevel=2,
                )
            return counters, rows
        reasons.append(reason)
    if reasons:
        raise EspalierError(f"{' and '.join(reasons)}: delete both to start over, or restore them from a copy")
    return Counters(), []


def has_checkpoint(folder: Path) -> bool:
    """Return whether a run has a checkpoint to go on from."""
    return any((folder / name).exists() for name in (_CURRENT, _OLD))


def drop_checkpoint(folder: Path) -> None:
    """Delete the checkpoints of a finished run: its weights are in final.safetensors."""
    for name in (_CURRENT, _OLD, _PARTIAL):
        _remove(folder / name)


def clear_finished(folder: Path) -> None:
    """Delete what a run left that was killed after its result was written: checkpoints, and its lock."""
    drop_checkpoint(folder)
    with suppress(OSError):
        lock_of(folder).unlink()


def recover(folder: Path) -> None:
    """Clear away what a kill left half written, and finish the exchange of checkpoints that it may have cut off."""
    for left in folder.glob(".*.partial"):
        left.unlink()
    _remove(folder / _PARTIAL)
    if not (folder / _CURRENT).exists():
        _remove(folder / _CURRENT)  # a link that leads nowhere
        if (folder / _OLD).exists():
            os.rename(folder / _OLD, folder / _CURRENT)


def _remove(path: Path) -> None:
    """Delete what bears the name of a checkpoint: a folder, or what somebody put there instead, such as a link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _damage(path: Path) -> str | None:
    """Return what is wrong with this process's share of a checkpoint's files, None if nothing is."""
    rank, world = rank_and_world()
    try:
        files, _ = read_manifest(path)
        name = damaged(path, sorted({_STATE, *files})[rank::world])
    except EspalierError as error:
        return str(error).partition(":")[0]
    return None if name is None else f"{path / name} is damaged"


def _load(
    path: Path, model: nn.Module, optimizer: Optimizer, averages: Mapping[str, Tensor], steps_per_epoch: int
) -> tuple[Counters, Rows]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    try:
        content = read_object(path / _STATE)
        counters = from_values(Counters, content["counters"], "its counters")
        done = counters.step - counters.epoch * steps_per_epoch
        if min(counters.epoch, counters.step, counters.loss_steps) < 0 or not 0 <= done <= steps_per_epoch:
            raise ValueError(f"it stands at step {counters.step} after {counters.epoch} epochs")
        if not all(isinstance(row, dict) for row in content["rows"]):
            raise ValueError("its rows are none")
        for name, keys in content["optimizer"].items():
            like = model.get_parameter(name)
            number = torch.zeros((), dtype=torch.float32, device=like.device)
            optimizer.state[like] = {key: number.clone() if key in _NUMBERS else torch.zeros_like(like) for key in keys}
        if content["averages"] != bool(averages):
            raise ValueError("averaged weights are in one of the two")
        entries: Any = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
        _shape_buffers(model, entries)
        tensors = _tensors(model, optimizer, averages)
        stored = {name: tuple(entry.size) for name, entry in entries.items()}
        wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if differing := stored.items() ^ wanted.items():
            name, _ = min(differing)
            raise ValueError(f"{name} is {stored.get(name)} there and {wanted.get(name)} here")
        with _plain_errors():
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=rank_and_world()[1] == 1)
        return counters, content["rows"]
    except Exception as error:  # a dozen kinds: the digests are right, so somebody made this checkpoint by hand
        raise EspalierError(
            f"checkpoint {path} is not one of this run ({told(error)}): delete it to start over"
        ) from error


def _shape_buffers(model: nn.Module, entries: Mapping[str, Any]) -> None:
    """Make room for the buffers that are no part of the model's state: training may have put others in their places."""
    device = next(model.parameters()).device
    for place, module in model.named_modules():
        for key in module._non_persistent_buffers_set:
            entry, buffer = entries.get(f"model/{place}.{key}" if place else f"model/{key}"), module._buffers[key]
            if entry is not None and (
                buffer is None or (buffer.shape, buffer.dtype) != (entry.size, entry.properties.dtype)
            ):
                module._buffers[key] = torch.empty(entry.size, dtype=entry.properties.dtype, device=device)


def _tensors(model: nn.Module, optimizer: Optimizer, averages: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return every tensor of a checkpoint by name; a tied weight stands once, under its first name."""
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    found = {f"model/{name}": tensor.detach() for name, tensor in {**parameters, **buffers}.items()}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"optimizer/{name}/{key}"] = value
    return found | {f"averages/{name}": tensor for name, tensor in averages.items()}


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Raise what failed in a process in place of torch's report about all; one process is no reason to warn."""
    from torch.distributed.checkpoint import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error
