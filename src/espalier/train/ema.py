"""Averaged weights: an exponential moving average that is evaluated in place of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from espalier.train.nonfinite import is_finite
from espalier.train.parallel import local_part


class AveragedWeights:
    """Averages ā ← d·ā + (1−d)·w of every weight and running statistic of a model, d = min(decay, (1+n)/(10+n)).

    The ramp over the number n of updates keeps a short run from being held at its start. Buffers are averaged like
    weights, but for those that are no statistics: what holds integers, is not finite at the start (a mask of −∞) or is
    no part of the model's state is the model's own. Shards are averaged as shards.
    ``torch.optim.swa_utils.AveragedModel`` copies the whole model, which FSDP2 forbids, and forgets the start.

    Args:
        model: the model whose weights are averaged; the average starts from them.
        decay: decay per step, in [0, 1); with 0 the averages are the weights themselves, and nothing is kept.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        # Not the tensors of state_dict(): a tied weight appears there twice and would be averaged twice.
        stored = model.state_dict().keys()
        weights = {name: p.detach() for name, p in model.named_parameters() if decay and _has_numbers(p)}
        statistics = {
            name: buffer.detach()
            for name, buffer in model.named_buffers()
            if decay and name in stored and _has_numbers(buffer) and is_finite(buffer)
        }
        self.tensors = {name: tensor.clone() for name, tensor in (weights | statistics).items()}
        """The averages by name; checkpoints read and write them in place (``updates`` is the run's step count)."""
        self._weights = [local_part(tensor) for tensor in weights.values()]
        places = (name.rpartition(".") for name in statistics)
        self._statistics = [(model.get_submodule(module), name) for module, _, name in places]
        self._averages = [local_part(tensor) for tensor in self.tensors.values()]

    def _live(self) -> list[Tensor]:
        # A module may put another tensor in a buffer's place: self.mean = 0.9 * self.mean + …
        return [*self._weights, *(getattr(module, name).detach() for module, name in self._statistics)]

    @torch.no_grad()
    def update(self) -> None:
        """Take the model's present weights into the average."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        if self.tensors:
            torch._foreach_lerp_(self._averages, self._live(), 1.0 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model the averaged weights for the length of a ``with`` block."""
        if not self.tensors:
            yield
            return
        kept = [tensor.clone() for tensor in self._live()]
        torch._foreach_copy_(self._live(), self._averages)
        try:
            yield
        finally:
            torch._foreach_copy_(self._live(), kept)


def _has_numbers(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
