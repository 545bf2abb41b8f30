"""Whether calling a layer does what its class does and no more, so that a kernel may compute it from its weights.

A layer that was replaced, subclassed, patched, parametrised or hooked is called as a module: adapters, quantisers and
observers then see what they would see without kernels.
"""

from __future__ import annotations

from typing import TypeGuard, TypeVar

from torch import nn
from torch.nn.modules import module as module_hooks

Layer = TypeVar("Layer", bound=nn.Module)


def is_watched(module: nn.Module) -> bool:
    """Return whether calling the module does more than its class's ``forward``: hooks, patches, parametrisations."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or hasattr(module, "parametrizations")
        or module_hooks._global_forward_hooks
        or module_hooks._global_forward_pre_hooks
        or module_hooks._global_backward_hooks
        or module_hooks._global_backward_pre_hooks
    )


def computes_as(module: nn.Module, kind: type[Layer]) -> TypeGuard[Layer]:
    """Return whether the forward pass is that of ``kind``, on ``weight`` as it is: a subclass may quantise it, say."""
    methods = ("forward", "_conv_forward", "__call__")
    own = type(module)
    return (
        isinstance(module, kind)
        and all(getattr(own, name, None) is getattr(kind, name, None) for name in methods)
        and not any(name in vars(module) for name in methods)
    )


def is_plain(module: nn.Module, kind: type[Layer]) -> TypeGuard[Layer]:
    """Return whether calling the module runs the code of ``kind`` and nothing else."""
    return computes_as(module, kind) and not is_watched(module)
