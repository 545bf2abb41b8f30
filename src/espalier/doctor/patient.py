"""What a check may look at: the tensors' records, and the model, configuration and optimiser where there are some."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from espalier.doctor.record import Record
from espalier.doctor.stats import TensorStats
from espalier.init.trained import drawn_around_zero

# Gates, detectors and step sizes start at constants of up to 14 (a step of 1e-6).
LARGEST_BIAS = 20.0


@dataclass
class Patient:
    """Everything that the checks look at.

    Attributes:
        model: the module; ``None`` for a bare checkpoint.
        config: the model's configuration as a mapping; empty where there is none.
        load: returns one tensor by name, whole, on every rank at once.
        optimizer: the optimiser that is to train the model, or ``None``.
        against: an earlier ``StructureReport``, or tensors by name that the model should hold, or ``None``.
        heads: query heads, where they are known.
        records: every tensor that was read.
        aliases: other names of the same tensor, by the name that is read.
        names: of every tensor that is or will be read.
    """

    model: nn.Module | None
    config: Mapping[str, Any]
    load: Callable[[str], Tensor]
    optimizer: torch.optim.Optimizer | None = None
    against: Any = None
    heads: int | None = None
    records: list[Record] = field(default_factory=list)
    aliases: dict[str, list[str]] = field(default_factory=dict)
    names: frozenset[str] = frozenset()

    def measured(self) -> Iterator[tuple[Record, TensorStats]]:
        """Yield every tensor that holds numbers, with them."""
        return ((record, record.stats) for record in self.records if record.stats is not None)

    def learns(self, record: Record) -> bool:
        """Return whether a tensor is to be trained; a bare checkpoint does not say, so that all of it counts."""
        return record.trainable or self.model is None

    @cached_property
    def trained(self) -> bool:
        """Whether the weights look trained: at least half of the normalisation gains differ from entry to entry.

        Nearly every library starts them at a constant. A gain drawn from noise around zero does not count, nor one that
        spreads as far as its mean and well below zero (RepVGG's start so): no training leaves them like that. A model
        without normalisation is judged by its biases, which start constant or uniform.
        """
        finite = [(record, stats) for record, stats in self.measured() if not stats.nonfinite]
        gains = [stats for record, stats in finite if record.role == "norm" and stats.numel >= 8]
        if gains:
            moved = [
                not s.constant
                and not drawn_around_zero(s.mean, s.std)
                and not (s.std > 0.7 * abs(s.mean) and s.minimum < -s.std / 2)
                for s in gains
            ]
        else:
            # A bias that drowns its layer's weight was drawn wrongly: no training takes it that far.
            biases = [(bias, stats) for bias, stats in finite if bias.role == "bias" and stats.numel >= 32]
            moved = [_left_its_start(stats) for bias, stats in biases if not self.drowns(bias)]
        return bool(moved) and 2 * sum(moved) >= len(moved)

    def output_beside(self, bias: Record) -> float | None:
        """Return the root mean square of what the weight beside a bias makes of inputs of size one.

        ``None`` where there is no weight, and beside one of zero, where a bias speaks alone on purpose, as the grid of
        deformable attention.
        """
        weight = self.find(f"{bias.layer}.weight")
        if weight is None or weight.stats is None or not weight.matrix or weight.stats.nonfinite:
            return None
        return weight.stats.rms * math.sqrt(weight.fans[0]) or None

    def drowns(self, bias: Record) -> bool:
        """Return whether a bias is far larger than all that the weight beside it can say of the input.

        Noise drowns it from ten times its outputs on. Constants are written on purpose, and those of gates, detectors
        and step sizes reach 14: they, too, count from 20 on. The last layer may start at the mean of any target, or at
        the logarithms of the classes' shares.
        """
        output, stats = self.output_beside(bias), bias.stats
        if output is None or stats is None:
            return False
        # A layer is not the last one where a later weight takes as many inputs as its bias has entries.
        read = self._last_reader.get(math.prod(bias.shape), -1) > self._places[bias.name]
        if stats.noise and stats.std > max(1.0 if read else 5.0, 10 * output):
            return True
        return read and stats.rms > max(LARGEST_BIAS, 10 * output)

    @cached_property
    def _last_reader(self) -> dict[int, int]:
        """The place of the last weight that takes so many inputs."""
        readers = ((place, r) for place, r in enumerate(self.records) if r.role == "weight" and r.matrix)
        return {_inputs(record): place for place, record in readers}

    def alone(self, record: Record) -> bool:
        """Return whether a tensor is zero where nearly all of its kind, three or more, are not."""
        kin = [stats.closed for _, stats in self.kin.get((record.pattern, record.shape), ())]
        return len(kin) >= 3 and sum(kin) <= max(1, len(kin) // 4)

    @cached_property
    def kin(self) -> dict[tuple[str, tuple[int, ...]], list[tuple[Record, TensorStats]]]:
        """The tensors that hold numbers, by pattern and shape: one kind of every layer."""
        groups: dict[tuple[str, tuple[int, ...]], list[tuple[Record, TensorStats]]] = {}
        for record, stats in self.measured():
            groups.setdefault((record.pattern, record.shape), []).append((record, stats))
        return groups

    def find(self, name: str) -> Record | None:
        """Return the record of a tensor, or ``None``."""
        place = self._places.get(name.lstrip("."))
        return None if place is None else self.records[place]

    @cached_property
    def _places(self) -> dict[str, int]:
        return {record.name: place for place, record in enumerate(self.records)}


def _left_its_start(bias: TensorStats) -> bool:
    """Return whether a bias is neither constant, nor all but zero, nor uniform about zero (rms 0.58 of its bound)."""
    uniform = 0.48 < bias.rms / max(bias.magnitude, 1e-30) < 0.7 and abs(bias.mean) < 0.3 * bias.magnitude
    return bias.distinct > 8 and bias.rms > 1e-4 and not uniform


def _inputs(weight: Record) -> int:
    """Return how many inputs a layer takes; a depthwise convolution as many as it has filters."""
    channels = getattr(weight.module, "in_channels", None)
    if isinstance(channels, int):
        return channels
    return weight.shape[0] if weight.filters or type(weight.module).__name__ == "Conv1D" else weight.shape[1]
