"""What a check may look at: the tensors' records, and the model, configuration and optimiser where there are some."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
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

    @cached_property
    def trained(self) -> bool:
        """Whether the weights look trained: at least half of the normalisation gains differ from entry to entry.

        Nearly every library starts them at a constant. A gain drawn from noise around zero does not count, nor one that
        spreads as far as its mean and well below zero (RepVGG's start so): no training leaves them like that. A model
        without normalisation is judged by its biases, which start constant or uniform.
        """
        stats = [(r.role, r.stats) for r in self.records if r.stats and not r.stats.nonfinite]
        gains = [s for role, s in stats if role == "norm" and s.numel >= 8]
        if gains:
            moved = [
                not s.constant
                and not drawn_around_zero(s.mean, s.std)
                and not (s.std > 0.7 * abs(s.mean) and s.minimum < -s.std / 2)
                for s in gains
            ]
        else:
            # A bias that drowns its layer's weight was drawn wrongly: no training takes it that far.
            biases = [r for r in self.records if r.role == "bias" and r.stats and not r.stats.nonfinite]
            moved = [_left_its_start(r.stats) for r in biases if r.stats and r.stats.numel >= 32 and not self.drowns(r)]
        return bool(moved) and 2 * sum(moved) >= len(moved)

    def output_beside(self, bias: Record) -> float | None:
        """Return the root mean square of what the weight beside a bias makes of inputs of size one.

        ``None`` where there is no weight, and beside one of zero, where a bias speaks alone on purpose, as the grid of
        deformable attention.
        """
        weight = self.find(f"{bias.layer}.weight".lstrip("."))
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
        read = self._is_read(bias)
        if stats.noise and stats.std > max(1.0 if read else 5.0, 10 * output):
            return True
        return read and stats.rms > max(LARGEST_BIAS, 10 * output)

    def _is_read(self, bias: Record) -> bool:
        """Return whether a later weight takes as many inputs as a bias has entries: its layer is then not the last."""
        width = math.prod(bias.shape)
        return self._last_reader.get(width, -1) > self._order[bias.name]

    @cached_property
    def _order(self) -> dict[str, int]:
        return {record.name: index for index, record in enumerate(self.records)}

    @cached_property
    def _last_reader(self) -> dict[int, int]:
        """The place of the last weight that takes so many inputs."""
        readers = [r for r in self.records if r.role == "weight" and r.matrix]
        return {_inputs(record): self._order[record.name] for record in readers}

    def alone(self, record: Record) -> bool:
        """Return whether a tensor is zero where nearly all of its kind, three or more, are not."""
        kin = [r.stats for r in self._by_pattern.get((record.pattern, record.shape), ()) if r.stats is not None]
        closed = sum(stats.constant and stats.minimum == 0 for stats in kin)
        return len(kin) >= 3 and closed <= max(1, len(kin) // 4)

    @cached_property
    def _by_pattern(self) -> dict[tuple[str, tuple[int, ...]], list[Record]]:
        groups: dict[tuple[str, tuple[int, ...]], list[Record]] = {}
        for record in self.records:
            groups.setdefault((record.pattern, record.shape), []).append(record)
        return groups

    def find(self, name: str) -> Record | None:
        """Return the record of a tensor, or ``None``."""
        return self._by_name.get(name)

    @cached_property
    def _by_name(self) -> dict[str, Record]:
        return {record.name: record for record in self.records}


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
