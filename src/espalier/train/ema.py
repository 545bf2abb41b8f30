"""Averaged weights: an exponential moving average that is evaluated in place of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from espalier.train.parallel import local_part


class AveragedWeights:
    """Averages ā ← d·ā + (1−d)·w of every floating tensor of a model's state, d = min(decay, (1+n)/(10+n)).

    The ramp over the number n of updates keeps a short run from being held at its start. Running statistics of
    norms are averaged like weights; integer buffers are left to the model. Shards are averaged as shards.
    ``torch.optim.swa_utils.AveragedModel`` copies the whole model, which FSDP2 forbids, and forgets the start.

    Args:
        model: the model whose weights are averaged; the average starts from them.
        decay: decay per step, in [0, 1); with 0 the averages are the weights themselves, and nothing is kept.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        live = {name: tensor.detach() for name, tensor in _state(model).items() if decay and tensor.is_floating_point()}
        self.tensors = {name: tensor.clone() for name, tensor in live.items()}
        """The averages by name; checkpoints read and write them in place (``updates`` is the run's step count)."""
        self._live = [local_part(tensor) for tensor in live.values()]
        self._averages = [local_part(tensor) for tensor in self.tensors.values()]

    @torch.no_grad()
    def update(self) -> None:
        """Take the model's present weights into the average."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        if self.tensors:
            torch._foreach_lerp_(self._averages, self._live, 1.0 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model the averaged weights for the length of a ``with`` block."""
        if not self.tensors:
            yield
            return
        kept = [tensor.clone() for tensor in self._live]
        torch._foreach_copy_(self._live, self._averages)
        try:
            yield
        finally:
            torch._foreach_copy_(self._live, kept)


def _state(model: nn.Module) -> dict[str, Tensor]:
    # Not state_dict(): a tied weight appears there twice and would be averaged twice.
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
