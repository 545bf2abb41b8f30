"""Files that appear whole or not at all: weights, and the checkpoint that a killed run goes on from."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from espalier.errors import EspalierError
from espalier.files import load_weights, tensors_bytes

# Note [Replacing a folder]
# A folder that is not empty cannot be replaced by one rename. A new checkpoint is written as ``checkpoint.partial``,
# renamed to ``checkpoint.new`` when it is complete, the old one is deleted, and the new one takes its name. Whoever
# finds ``checkpoint.new`` therefore knows that it is complete and newer, whatever is left of ``checkpoint``.
_CURRENT, _NEW, _PARTIAL = "checkpoint", "checkpoint.new", "checkpoint.partial"


@dataclass
class Counters:
    """Where a run stands: everything that a resumed one needs besides tensors."""

    epoch: int = 0
    """Completed epochs."""
    step: int = 0
    """Completed optimiser steps."""
    rows: int = 0
    """Rows of metrics.jsonl that belong to this state."""
    seconds: float = 0.0
    """Training time so far, evaluation excluded."""
    loss_sum: float = 0.0
    """Sum of the losses of the steps since the last row."""
    loss_steps: int = 0
    """Number of those steps."""


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    averages: Mapping[str, Tensor] | None,
    counters: Counters,
) -> None:
    """Replace the run's checkpoint by the present state; a kill at any instant leaves the old one or the new one.

    Args:
        folder: the run folder.
        model: the bare model.
        optimizer: its optimiser.
        averages: the averaged weights, if any are kept.
        counters: where the run stands.
    """
    partial = folder / _PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        (partial / "model.safetensors").write_bytes(tensors_bytes(model.state_dict()))
        state = io.BytesIO()
        averaged = None if averages is None else dict(averages)
        torch.save({"optimizer": optimizer.state_dict(), "ema": averaged, "counters": asdict(counters)}, state)
        (partial / "state.pt").write_bytes(state.getbuffer())
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    os.rename(partial, folder / _NEW)
    settle(folder)


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[Counters, dict[str, Tensor] | None] | None:
    """Load the run's checkpoint into the model and the optimiser.

    Args:
        folder: the run folder.
        model: the bare model, already on its device.
        optimizer: its optimiser.

    Returns:
        Where the run stood and its averaged weights, or None where there is no checkpoint yet (call ``settle`` first).

    Raises:
        EspalierError: the checkpoint is damaged.
    """
    current = folder / _CURRENT
    if not current.exists():
        return None
    load_weights(model, current / "model.safetensors")
    try:
        device = next(model.parameters()).device
        state = torch.load(current / "state.pt", map_location=device, weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        return Counters(**state["counters"]), state["ema"]
    except Exception as error:  # torch.load raises half a dozen kinds for a damaged file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise EspalierError(f"checkpoint {current} is damaged ({reason}): delete that folder to start over") from error


def drop_checkpoint(folder: Path) -> None:
    """Delete the checkpoint of a finished run: its weights are in final.safetensors."""
    for name in (_CURRENT, _NEW, _PARTIAL):
        shutil.rmtree(folder / name, ignore_errors=True)


def settle(folder: Path) -> None:
    """Finish the replacement of a checkpoint that a kill may have cut off (Note [Replacing a folder]).

    Files that a kill left half written are removed: nobody else writes in a run folder.
    """
    for left in folder.glob(".*.partial"):
        left.unlink()
    new = folder / _NEW
    if new.exists():
        shutil.rmtree(folder / _CURRENT, ignore_errors=True)
        os.rename(new, folder / _CURRENT)
