"""What a layer of a class of its own makes of its weight: the layer itself is asked, with made-up inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from espalier.doctor.lent import lend_copies
from espalier.doctor.patient import Record
from espalier.doctor.stats import root_mean_square
from espalier.init.sharded import is_distributed
from espalier.randomness import generators_kept

# What these hold is turned into a weight first: divided by its norm, masked, scaled.
_COMPUTED = ("original", "weight_v", "weight_orig")
Answer = TypeVar("Answer", float | None, bool | None)


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
    # A pass may wait for other ranks, which need not ask.
    return None if is_distributed() else _ask(_share, record, module)


def adds_one(record: Record) -> bool | None:
    """Return whether a normalisation class multiplies by 1 + w rather than w; ``None`` where it cannot be told.

    The class itself is asked, with gains of zero and of one and without biases: w·x̂ gives 0 and x̂, (1 + w)·x̂ gives
    x̂ and 2·x̂, whatever x̂ is.
    """
    if record.module is None or len(record.shape) != 1:
        return None
    return False if of_torch(record.module) else _ask(_adds_one, record, record.module)


def of_torch(module: nn.Module) -> bool:
    """Return whether a module's forward pass is torch's own, also under a subclass that does not change it."""
    return str(getattr(module.forward, "__module__", "")).startswith("torch.")


@torch.no_grad()
def _ask(question: Callable[[Record, nn.Module, Tensor], Answer], record: Record, module: nn.Module) -> Answer | None:
    """Put a question to a module that holds nothing but its own whole parameters."""
    weight = module._parameters.get(record.leaf)
    sharded = any(hasattr(part, "to_local") for part in module._parameters.values())
    if weight is None or module._modules or module._buffers or record.meta or sharded:
        return None
    before = dict(vars(module))
    with generators_kept([weight.device] if weight.is_cuda else []):
        try:
            lend_copies([module])
            # Hooks are no business of a made-up input: they may count or log it.
            vars(module).update((name, type(hooks)()) for name, hooks in before.items() if "_hooks" in name)
            return question(record, module, weight)
        except Exception:  # whatever a class of its own raises at an input that it does not take
            return None
        finally:
            vars(module).clear()
            vars(module).update(before)


def _share(record: Record, module: nn.Module, weight: Tensor) -> float | None:
    groups: Any = getattr(module, "groups", 1)
    # A little larger than the kernel: most outputs are to see all of it.
    shape = 4, weight.shape[1] * groups, *(3 * size for size in weight.shape[2:])
    generator = torch.Generator(device="cpu").manual_seed(0)
    x = torch.randn(shape, generator=generator, device="cpu").to(weight.device, weight.dtype)
    # Of copies: a pass may write into its weights, as one that keeps them normalised does.
    copies = {name: own.clone() for name, own in module._parameters.items() if own is not None}
    full, none = (
        torch.func.functional_call(module, copies | {record.leaf: own}, (x,))
        for own in (weight.clone(), torch.zeros_like(weight))
    )
    measured = root_mean_square(full - none) / root_mean_square(x)
    expected = root_mean_square(weight) * math.sqrt(record.fans[0])
    return measured / expected if 0 < measured < math.inf else None


def _adds_one(record: Record, module: nn.Module, weight: Tensor) -> bool | None:
    wave = torch.linspace(-1, 1, len(weight), dtype=torch.float32, device=weight.device)
    x = (wave + wave.square()).expand(1, 2, -1).contiguous().to(weight.dtype)
    blank = {name: torch.zeros_like(own) for name, own in module._parameters.items() if own is not None}
    zero, one = (
        torch.func.functional_call(module, blank | {record.leaf: torch.full_like(weight, gain)}, (x,)).float()
        for gain in (0.0, 1.0)
    )
    if not zero.any():
        return False if one.any() else None
    return True if torch.allclose(one, 2 * zero, rtol=0.02) else None
