"""What a layer of a class of its own makes of its weight: the layer itself is asked, with made-up inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from espalier.doctor.lent import lend_copies
from espalier.doctor.stats import root_mean_square
from espalier.init.sharded import is_distributed
from espalier.randomness import generators_kept

# What these hold is turned into a weight first: divided by its norm, masked, scaled.
_COMPUTED = ("original", "weight_v", "weight_orig")
Answer = TypeVar("Answer", float | None, bool | None)


def multiplier(module: nn.Module | None, leaf: str, fan_in: int) -> float | None:
    """Return how much of a weight's size reaches the outputs: 1 in a linear layer, 1/√fan-in in an equalised one.

    Classes of torch and bare checkpoints multiply by the weight as it is. ``None`` where the class takes other
    arguments, holds more than one layer, or computes its weight.
    """
    if leaf.startswith(_COMPUTED):
        return None
    if module is None or is_transposed(module) or of_torch(module):
        return 1.0
    # A pass may wait for other ranks, which need not ask.
    return None if is_distributed() else _ask(partial(_share, fan_in=fan_in), leaf, module)


def adds_one(module: nn.Module | None, leaf: str) -> bool | None:
    """Return whether a normalisation class multiplies by 1 + w rather than w; ``None`` where it cannot be told.

    The class itself is asked, with gains of zero and of one and without biases: w·x̂ gives 0 and x̂, (1 + w)·x̂ gives
    x̂ and 2·x̂, whatever x̂ is.
    """
    weight = None if module is None else module._parameters.get(leaf)
    if module is None or weight is None or weight.ndim != 1:
        return None
    return False if of_torch(module) else _ask(_adds_one, leaf, module)


def normalises(module: nn.Module, leaf: str) -> bool:
    """Return whether a class of the user's own gives the same for an input of four times the size, as a norm does."""
    weight = module._parameters.get(leaf)
    if weight is None or weight.ndim != 1 or of_torch(module) or is_distributed():
        return False
    return bool(_ask(_keeps_no_size, leaf, module))


def is_transposed(module: nn.Module | None) -> bool:
    """Return whether a layer is GPT-2's linear layer, or made on it: it keeps the transpose."""
    return any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)


def of_torch(module: nn.Module) -> bool:
    """Return whether a module's forward pass is torch's own, also under a subclass that does not change it."""
    return str(getattr(module.forward, "__module__", "")).startswith("torch.")


@torch.no_grad()
def _ask(question: Callable[[str, nn.Module, Tensor], Answer], leaf: str, module: nn.Module) -> Answer | None:
    """Put a question to a module that holds nothing but its own whole parameters."""
    weight = module._parameters.get(leaf)
    sharded = any(hasattr(part, "to_local") for part in module._parameters.values())
    if weight is None or module._modules or module._buffers or weight.is_meta or sharded:
        return None
    before = dict(vars(module))
    with generators_kept([weight.device] if weight.is_cuda else []):
        try:
            lend_copies([module])
            # Hooks are no business of a made-up input: they may count or log it.
            vars(module).update((name, type(hooks)()) for name, hooks in before.items() if "_hooks" in name)
            return question(leaf, module, weight)
        except Exception:  # whatever a class of its own raises at an input that it does not take
            return None
        finally:
            vars(module).clear()
            vars(module).update(before)


def _share(leaf: str, module: nn.Module, weight: Tensor, fan_in: int) -> float | None:
    groups: Any = getattr(module, "groups", 1)
    # A little larger than the kernel: most outputs are to see all of it.
    shape = 4, weight.shape[1] * groups, *(3 * size for size in weight.shape[2:])
    generator = torch.Generator(device="cpu").manual_seed(0)
    x = torch.randn(shape, generator=generator, device="cpu").to(weight.device, weight.dtype)
    # Of copies: a pass may write into its weights, as one that keeps them normalised does.
    copies = {name: own.clone() for name, own in module._parameters.items() if own is not None}
    full, none = (
        torch.func.functional_call(module, copies | {leaf: own}, (x,))
        for own in (weight.clone(), torch.zeros_like(weight))
    )
    measured = root_mean_square(full - none) / root_mean_square(x)
    expected = root_mean_square(weight) * math.sqrt(fan_in)
    return measured / expected if 0 < measured < math.inf else None


def _keeps_no_size(leaf: str, module: nn.Module, weight: Tensor) -> bool:
    """Return whether outputs at a gain of one vary with the input, and not with its size."""
    neutral = {name: torch.zeros_like(own) for name, own in module._parameters.items() if own is not None}
    neutral[leaf] = torch.ones_like(weight)
    generator = torch.Generator(device="cpu").manual_seed(0)
    x = torch.randn(2, 3, len(weight), generator=generator, device="cpu").to(weight.device, weight.dtype)
    for inputs in (x, x.mT.unsqueeze(-1).expand(-1, -1, -1, 2).contiguous()):  # features last, or channels first
        try:
            once, larger = (torch.func.functional_call(module, neutral, (scale * inputs,)).float() for scale in (1, 4))
        except (RuntimeError, ValueError, IndexError):
            continue
        if once.shape == inputs.shape and once.std() > 0.1 and torch.allclose(once, larger, rtol=0.02, atol=0.02):
            return True
    return False


def _adds_one(leaf: str, module: nn.Module, weight: Tensor) -> bool | None:
    wave = torch.linspace(-1, 1, len(weight), dtype=torch.float32, device=weight.device)
    x = (wave + wave.square()).expand(1, 2, -1).contiguous().to(weight.dtype)
    blank = {name: torch.zeros_like(own) for name, own in module._parameters.items() if own is not None}
    zero, one = (
        torch.func.functional_call(module, blank | {leaf: torch.full_like(weight, gain)}, (x,)).float()
        for gain in (0.0, 1.0)
    )
    if not zero.any():
        return False if one.any() else None
    return True if torch.allclose(one, 2 * zero, rtol=0.02) else None
