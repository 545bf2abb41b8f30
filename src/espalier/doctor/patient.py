"""What a check may look at: the tensors' records, and the model, configuration and optimiser where there are some."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from espalier.doctor.record import Record
from espalier.doctor.stats import TensorStats
from espalier.init.trained import drawn_around_zero


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
            moved = [_left_its_start(s) for role, s in stats if role == "bias" and s.numel >= 32]
        return bool(moved) and 2 * sum(moved) >= len(moved)

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
