"""What a check may look at: the tensors' records, and the model, configuration and optimiser where there are some."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from espalier.doctor.asked import is_transposed
from espalier.doctor.roles import Role
from espalier.doctor.stats import TensorStats
from espalier.init.layouts.find import locate_layers
from espalier.init.layouts.registry import AttentionWeights, LatentAttentionWeights, attribute
from espalier.init.sharded import is_distributed
from espalier.init.trained import drawn_around_zero

# Gates, detectors and step sizes start at constants of up to 14 (a step of 1e-6).
LARGEST_BIAS = 20.0


@dataclass(frozen=True)
class Record:
    """One parameter or buffer.

    Attributes:
        name: its full name, without what wrappers (DDP, torch.compile, FSDP) put into it.
        role: what it is for.
        shape, dtype: of the whole tensor, also when it is sharded.
        buffer: whether it is a buffer.
        trainable: whether it wants a gradient; ``False`` in a bare checkpoint.
        meta: whether it has no storage.
        fans: how many inputs each output sums over, and how many outputs each input goes to; 1 for vectors.
        module: the module that owns it; ``None`` in a bare checkpoint.
        stats: its numbers; ``None`` if it holds none.
        values: the tensor itself, only while the checks of single tensors look at it.
    """

    name: str
    role: Role
    shape: tuple[int, ...]
    dtype: torch.dtype
    buffer: bool = False
    trainable: bool = False
    meta: bool = False
    fans: tuple[int, int] = (1, 1)
    module: nn.Module | None = None
    stats: TensorStats | None = None
    values: Tensor | None = None

    @property
    def parameter(self) -> Tensor | None:
        """The parameter in its module; ``None`` for a buffer, and in a bare checkpoint."""
        # A scripted module's table is no dictionary.
        return None if self.module is None else dict(self.module._parameters.items()).get(self.leaf)

    @property
    def gradient(self) -> Tensor | None:
        """The gradient that the parameter got, whole; ``None`` where it got none."""
        own = self.parameter
        return None if own is None or own.grad is None else whole(own.grad)

    @property
    def layer(self) -> str:
        """Name of the module that owns the tensor."""
        return self.name.rpartition(".")[0]

    @property
    def leaf(self) -> str:
        """Name of the tensor within its module."""
        return self.name.rpartition(".")[2]

    @property
    def matrix(self) -> bool:
        """Whether it is a weight with at least two dimensions that are not one."""
        return not self.buffer and sum(size > 1 for size in self.shape) >= 2

    @property
    def multiplies(self) -> bool:
        """Whether its name says that a layer multiplies by it: others may be tables, coefficients or learned inputs."""
        return bool(re.search("weight|kernel|^original", self.leaf))

    @property
    def units(self) -> Tensor | None:
        """The values as a matrix, a row for each output; GPT-2's linear layer keeps the transpose."""
        values = self.values
        if values is None:
            return None
        return values.T if is_transposed(self.module) else values.reshape(len(values), -1)

    @property
    def filters(self) -> bool:
        """Whether it holds depthwise filters."""
        return len(self.shape) >= 3 and self.shape[1] == 1

    @property
    def pattern(self) -> str:
        """Its name with a star for every number: equal for the same tensor of other layers."""
        return pattern_of(self.name)


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
        spreads as far as its mean and well below zero (RepVGG's start so): no training leaves them like that; nor one
        close to a constant beside a bias of nothing but zeros, which training would move (DCGAN starts so). A model
        without normalisation is judged by its biases, which start constant or uniform.
        """
        finite = [(record, stats) for record, stats in self.measured() if not stats.nonfinite]
        gains = [(s, self._still(record, s)) for record, s in finite if record.role == "norm" and s.numel >= 8]
        if gains:
            moved = [
                not s.constant
                and not still
                and not drawn_around_zero(s.mean, s.std, s.numel)
                and not (s.std > 0.7 * abs(s.mean) and s.minimum < -s.std / 2)
                for s, still in gains
            ]
        else:
            # A bias that drowns its layer's weight was drawn wrongly: no training takes it that far.
            biases = [(bias, stats) for bias, stats in finite if bias.role == "bias" and stats.numel >= 32]
            moved = [_left_its_start(stats, self._fan_in(bias)) for bias, stats in biases if not self.drowns(bias)]
        return bool(moved) and 2 * sum(moved) >= len(moved)

    def _still(self, gain: Record, stats: TensorStats) -> bool:
        bias = self.find(f"{gain.layer}.bias")
        closed = bias is not None and bias.stats is not None and bias.stats.closed and self.learns(bias)
        return closed and stats.std < 0.1 * abs(stats.mean)

    def _fan_in(self, bias: Record) -> int:
        """Return how many inputs a layer of torch's counts for the bound of its bias; 0 where there is no weight."""
        weight = self.find(f"{bias.layer}.weight")
        return math.prod(weight.shape[1:]) if weight is not None and weight.matrix else 0

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

    def feeds_attention(self, record: Record) -> bool:
        """Return whether a weight makes queries or keys, of an attention layer that can be told, whatever its name."""
        own = record.parameter
        return own is not None and not record.meta and _place_of(own) in self._queries_and_keys

    @cached_property
    def _queries_and_keys(self) -> frozenset[int]:
        """Where queries' and keys' weights lie in memory."""
        layers = [] if self.model is None or is_distributed() else locate_layers(self.model)
        kinds = AttentionWeights, LatentAttentionWeights
        found = [layer.found for layer in layers if isinstance(layer.found, kinds)]
        return frozenset(_place_of(weight) for each in found for weight in (each.q, each.k)) - {0}

    def find(self, name: str) -> Record | None:
        """Return the record of a tensor, or ``None``."""
        place = self._places.get(name.lstrip("."))
        return None if place is None else self.records[place]

    @cached_property
    def _places(self) -> dict[str, int]:
        return {record.name: place for place, record in enumerate(self.records)}


def _place_of(tensor: Tensor) -> int:
    """Return the address of a tensor's memory; 0 where it has none of its own, as a quantised one."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


def _left_its_start(bias: TensorStats, fan_in: int) -> bool:
    """Return whether a bias is neither constant, nor all but zero, nor uniform about zero (rms 0.58 of its bound).

    Of a few dozen uniform draws the root mean square is often far from 0.58 of the largest; but the largest is all but
    torch's own bound, 1/√fan-in, and no training stops just there.
    """
    uniform = 0.48 < bias.rms / max(bias.magnitude, 1e-30) < 0.7 and abs(bias.mean) < 0.3 * bias.magnitude
    at_bound = 0.85 <= bias.magnitude * math.sqrt(fan_in) <= 1.01
    return bias.distinct > 8 and bias.rms > 1e-4 and not (uniform or at_bound)


def _inputs(weight: Record) -> int:
    """Return how many inputs a layer takes; a depthwise convolution as many as it has filters."""
    channels = attribute(weight.module, "in_channels")
    if isinstance(channels, int):
        return channels
    return weight.shape[0] if weight.filters or is_transposed(weight.module) else weight.shape[1]


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor without its graph, gathered from all ranks where each holds a shard."""
    return tensor.full_tensor().detach() if hasattr(tensor, "full_tensor") else tensor.detach()


def pattern_of(name: str) -> str:
    """Return a name with a star for every part that is a number."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
