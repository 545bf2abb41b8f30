"""Averaged weights: an exponential moving average that is evaluated in place of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class AveragedWeights:
    """Averages ā ← d·ā + (1−d)·w of every floating tensor of a model's state, d = min(decay, (1+n)/(10+n)).

    The ramp over the number n of updates keeps a short run from being held at its start. Running statistics of
    norms are averaged like weights; integer buffers are left to the model.

    Args:
        model: the model whose weights are averaged; the average starts from them.
        decay: decay per step, in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._live = {name: tensor for name, tensor in _state(model).items() if tensor.is_floating_point()}
        self._averages = {name: tensor.clone() for name, tensor in self._live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the model's present weights into the average."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self._averages.values()), list(self._live.values()), 1.0 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model the averaged weights for the length of a ``with`` block."""
        kept = {name: tensor.clone() for name, tensor in self._live.items()}
        self._write(self._averages)
        try:
            yield
        finally:
            self._write(kept)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages by name (the number of updates is the run's step count)."""
        return dict(self._averages)

    def load_state_dict(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Take over averages saved after ``updates`` updates."""
        self.updates = updates
        for name, average in self._averages.items():
            average.copy_(state[name])

    @torch.no_grad()
    def _write(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self._live[name].copy_(tensor)


def _state(model: nn.Module) -> dict[str, Tensor]:
    # Not state_dict(): a tied weight appears there twice and would be averaged twice.
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
