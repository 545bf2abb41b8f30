"""What a run is while it trains: its model, data, optimiser, counters, and what it is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from espalier.data.source import Source
from espalier.recipes.base import Recipe
from espalier.train.checkpoint import Counters
from espalier.train.ema import AveragedWeights
from espalier.train.loggers import RowLogger
from espalier.train.losses import Loss
from espalier.train.nonfinite import LossGuard, is_finite
from espalier.train.parallel import first_of_any
from espalier.train.progress import StepClock
from espalier.train.requests import Requests, RunInterrupted


@dataclass
class Session:
    """The live objects of a run."""

    recipe: Recipe
    out: Path
    fabric: Any
    source: Source
    model: nn.Module
    """The bare model: what is saved."""
    module: nn.Module
    """The model as the loop calls it: compiled, in its precision, perhaps distributed."""
    optimizer: torch.optim.Optimizer
    stepper: Any
    """The optimiser as the loop calls it."""
    averages: AveragedWeights
    loss: Loss
    counters: Counters
    requests: Requests
    logger: RowLogger | None
    """On the first process, if the recipe names one."""
    rows: list[dict[str, Any]]

    def __post_init__(self) -> None:
        self.resumed_at = self.counters.step
        rank, world = self.fabric.global_rank, self.fabric.world_size
        self.mine = slice(rank, None, world)
        """This process's share of a batch; the whole one where the source gives each process its own."""
        if world > 1 and hasattr(self.source, "share"):
            self.source.share(rank, world)
            self.mine = slice(None)
        self.guard = LossGuard(self.optimizer, self.fabric.device)
        self.request = torch.zeros((), device=self.fabric.device)
        """The largest request of any process at the step before."""
        self.steps_per_epoch = self.source.steps_per_epoch(self.recipe.batch_size)
        self.clock = StepClock(self.fabric.device)
        # Float64 holds a sum of float32 losses exactly enough that a resumed run reports the same mean to the bit.
        wide = torch.float32 if self.fabric.device.type == "mps" else torch.float64
        self.loss_sum = torch.tensor(self.counters.loss_sum, dtype=wide, device=self.fabric.device)
        # What is not finite from the start, such as a mask of −∞, may stay so; what is trained may not.
        state = self._state()
        self._watched = {name for name, tensor in state.items() if tensor.requires_grad or is_finite(tensor)}

    def _state(self) -> dict[str, Tensor]:
        averages = {f"averaged {name}": tensor for name, tensor in self.averages.tensors.items()}
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers()), **averages}

    def spoilt(self) -> str | None:
        """Return the name of a weight that has stopped being finite, None if all are: the same on all processes.

        The losses need not tell: a net or a loss may make a number of what is none.
        """
        watched = ((name, tensor) for name, tensor in self._state().items() if name in self._watched)
        return first_of_any(next((name for name, tensor in watched if not is_finite(tensor)), None))

    def agreed_request(self) -> int:
        """Return the largest request of any process, to all of them after the same step or batch."""
        request = self.requests.pending()
        if self.fabric.world_size > 1:
            # One call late, so that the host never waits for the step that it has just queued.
            mine, earlier = torch.full_like(self.request, float(request)), self.request
            self.request = self.fabric.all_reduce(mine, reduce_op="max")
            request = int(earlier.item())
        return request

    def stopped(self) -> RunInterrupted:
        """Return the exception that ends a run whose state is saved."""
        return self.requests.interruption(
            f"a checkpoint was written after step {self.counters.step}; run the same command again and the run in "
            f"{self.out} goes on from there"
        )
