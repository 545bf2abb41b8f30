"""What must not stand between a network and torch's operations while a bound holds for them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from espalier.certify.operations import leaves


def modes() -> tuple[int, int]:
    """Return how many modes see what torch dispatches, and how many see its functions."""
    return len(_get_current_dispatch_mode_stack()), torch._C._len_torch_function_stack()


def interference(
    tensors: Iterable[Tensor], device: str, expected_modes: tuple[int, int], *, layer: bool = False
) -> str | None:
    """Return why torch's operations may compute something else than their rules say, or None.

    Args:
        tensors: the constants that an operation is given.
        device: on which it runs.
        expected_modes: how many of ``modes`` there are outside of the network.
        layer: a whole layer is run, which a mode of functions could change from within.
    """
    if torch.is_autocast_enabled(device):
        return "runs under autocast: its arithmetic is not the one that is certified"
    if modes()[0] != expected_modes[0] or (layer and modes()[1] != expected_modes[1]):
        return "runs under a mode of the network's own, which can make something else of it: leave it before"
    odd = next((type(tensor).__name__ for tensor in tensors if type(tensor) not in (Tensor, nn.Parameter)), None)
    return f"is given a {odd}, whose operations are its own: give a plain tensor" if odd else None


_TORCH = frozenset(vars(nn.Module()))
_EXACT = (bool, int, float, complex, str, Tensor, nn.Parameter)


def odd_settings(module: nn.Module) -> str | None:
    """Return which tensor or number of a module is of a class of its own, with another arithmetic, or None."""
    for part in module.modules():
        settings = {name: item for name, item in vars(part).items() if name not in _TORCH}
        for name, item in (settings | part._parameters | part._buffers).items():
            odd = next((leaf for leaf in leaves([item]) if isinstance(leaf, _EXACT) and type(leaf) not in _EXACT), None)
            if odd is not None:
                return f"its {name} holds a {type(odd).__name__}, whose operations are its own"
    return None
