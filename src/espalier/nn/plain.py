"""Whether calling a layer does what its class does and no more, so that a kernel may compute it from its weights.

A layer that was replaced, subclassed, patched, parametrised or hooked is called as a module: adapters, quantisers and
observers then see what they would see without kernels.
"""

from __future__ import annotations

from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

Layer = TypeVar("Layer", bound=nn.Module)

_METHODS = ("forward", "_conv_forward", "__call__")
# Of every class that kernels stand in for: its methods as they were made. What is patched in later is called.
_ORIGINAL: dict[type[nn.Module], dict[str, Any]] = {}


def remember(kind: type[Layer]) -> type[Layer]:
    """Note the methods of a class as they are now, and return it."""
    _ORIGINAL[kind] = {name: getattr(kind, name, None) for name in _METHODS}
    return kind


for _kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.BatchNorm2d, nn.GELU):
    remember(_kind)


def is_watched(module: nn.Module) -> bool:
    """Return whether calling the module does more than its class's ``forward``: hooks, patches, parametrisations."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or "parametrizations" in module._modules
        or module_hooks._global_forward_hooks
        or module_hooks._global_forward_pre_hooks
        or module_hooks._global_backward_hooks
        or module_hooks._global_backward_pre_hooks
    )


def computes_as(module: nn.Module, kind: type[Layer]) -> TypeGuard[Layer]:
    """Return whether the forward pass is that of ``kind``, on ``weight`` as it is: a subclass may quantise it, say."""
    if not isinstance(module, kind) or _modes():
        return False
    own, instance = type(module), vars(module)
    for name, method in _ORIGINAL[kind].items():  # a loop, as small networks ask this at every layer of every pass
        if name in instance or getattr(own, name, None) is not method:
            return False
    return True


def _modes() -> bool:
    """Return whether a mode may change what torch's functions do; one that chooses a device does not."""
    if not torch._C._len_torch_function_stack():
        return False
    return not all(isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())


def is_plain(module: nn.Module, kind: type[Layer]) -> TypeGuard[Layer]:
    """Return whether calling the module runs the code of ``kind``, on weights that are numbers, and nothing else."""
    return computes_as(module, kind) and not is_watched(module) and _holds_numbers(module.weight, module.bias)


def _holds_numbers(*parameters: Any) -> bool:
    """Return whether tensors are torch's own: those of quantisers say only in whole products what they stand for."""
    return all(
        p is None or type(p) in (Tensor, nn.Parameter) or type(p).__module__.startswith("torch._subclasses")
        for p in parameters
    )
