"""What a layer of a class of its own makes of its weight: the layer itself is asked, with made-up inputs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from espalier.doctor.record import Record

# What these hold is turned into a weight first: divided by its norm, masked, scaled.
_COMPUTED = ("original", "weight_v", "weight_orig")


def multiplier(record: Record) -> float | None:
    """Return how much of a weight's size reaches the outputs: 1 in a linear layer, 1/√fan-in in an equalised one.

    Classes of torch and bare checkpoints multiply by the weight as it is. ``None`` where the class takes other
    arguments, holds more than one layer, or computes its weight.
    """
    module = record.module
    if record.leaf.startswith(_COMPUTED):
        return None
    if module is None or type(module).__name__ == "Conv1D" or of_torch(module):
        return 1.0
    parts = module._parameters.values()
    if module._modules or module._buffers or record.meta or any(hasattr(part, "to_local") for part in parts):
        return None
    # A pass may wait for other ranks, which need not ask.
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return None
    try:
        return _asked(record, module)
    except Exception:  # whatever a class of its own raises at an input that it does not take
        return None


def of_torch(module: nn.Module) -> bool:
    """Return whether a module's forward pass is torch's own, also under a subclass that does not change it."""
    return str(getattr(module.forward, "__module__", "")).startswith("torch.")


@torch.no_grad()
def _asked(record: Record, module: nn.Module) -> float | None:
    weight = module._parameters[record.leaf]
    assert weight is not None
    groups: Any = getattr(module, "groups", 1)
    # A little larger than the kernel: most outputs are to see all of it.
    shape = 4, weight.shape[1] * groups, *(3 * size for size in weight.shape[2:])
    generator = torch.Generator(device="cpu").manual_seed(0)
    x = torch.randn(shape, generator=generator, device="cpu").to(weight.device, weight.dtype)
    devices = [weight.device] if weight.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        full, none = (
            torch.func.functional_call(module, {record.leaf: own}, (x,)) for own in (weight, torch.zeros_like(weight))
        )
    measured = _rms(full - none) / _rms(x)
    expected = _rms(weight) * math.sqrt(record.fans[0])
    return measured / expected if 0 < measured < math.inf else None


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())
