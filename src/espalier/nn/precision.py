"""Arithmetic that must not lose digits: recurrences, decays and inverses run in float32 or better."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from espalier.errors import EspalierError

# The name costs a look-up of 5 µs at every call; the key does not.
_VMAP: Any = torch._C._parse_dispatch_key("VmapMode")
is_exporting: Callable[[], bool] = torch.compiler.is_exporting


def upcast(*tensors: Tensor | None) -> list[Any]:
    """Return the tensors in one dtype that keeps digits: float64 if any of them has it, else float32; None stays.

    Raises:
        EspalierError: one holds whole numbers, truth values or complex ones: they would be cut to the first's kind.
    """
    for tensor in tensors:
        if tensor is not None and not tensor.dtype.is_floating_point:
            raise EspalierError(
                f"a tensor is {tensor.dtype}: convert it to a floating type first (images: x.float() / 255)"
            )
    double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    dtype = torch.float64 if double else torch.float32
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def widened(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, for sums whose differences count; as it is on a device that has none."""
    return tensor if tensor.device.type == "mps" else tensor.double()


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a block without autocast on the device; meta and others that have no autocast need none."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run ``function(ctx, tensor, ...)`` with autocast off on the tensor's device: matrix products keep their dtype.

    The tensor may come by its name.
    """

    @functools.wraps(function)
    def run(ctx: Any, *given: Any, **named: Any) -> Any:
        first = next(iter((*given, *named.values())), None)
        with no_autocast(first.device) if isinstance(first, Tensor) else nullcontext():  # else the call is refused
            return function(ctx, *given, **named)

    return run


def is_tracing() -> bool:
    """Return whether something watches every operation, so that plain ones must run and nothing may be kept.

    A graph is made (``torch.compile``, ``torch.export``, tracing), ``torch.func`` transforms, forward-mode derivatives
    are computed, or a dispatch mode (fake tensors, say) is on. What is computed then may be no tensor of its own.
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or forward_ad._current_level >= 0
    )


def is_transformed() -> bool:
    """Return whether ``torch.func`` transforms or forward-mode derivatives are on: only torch's own operations have
    rules for those."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_batched() -> bool:
    """Return whether gradients stand for many at once: ``is_grads_batched``, Jacobians with ``vectorize=True``."""
    return torch._C._dispatch_tls_is_dispatch_key_included(_VMAP)


class _Followed(TorchDispatchMode):
    """Changes nothing, and while it is on ``is_tracing`` says so: plain operations run, and nothing in place."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def takes_batches(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Run ``backward(ctx, *gradients)`` by its plain formula, that of ``is_tracing``, if the gradients are batched.

    Such a gradient is one tensor that stands for many and has no memory of its own: kernels cannot read it, and what
    writes into tensors made for one gradient cannot hold it.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *gradients: Any) -> Any:
        with _Followed() if is_batched() else nullcontext():
            return backward(ctx, *gradients)

    return run


def differentiable(*tensors: Tensor | None) -> bool:
    """Return whether operations on these tensors are followed, by autograd or by what ``is_tracing`` names.

    Their inputs must then stay as they are, and kernels that autograd does not know must not run.
    """
    return is_tracing() or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))


def outside_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep ``function`` out of graphs that ``torch.compile`` makes; ``torch.export`` still sees through it.

    For work that gains nothing from a compiler and loses its in-place updates. ``torch.compiler.disable`` as a
    decorator would import the compiler with this library, which takes longer than all else in it; torch 2.11 traces
    through the call here all the same, and takes a function whose result was last changed in place for a constant: its
    gradient was zero. So what such a function returns must be fresh.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() and not is_exporting():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return run
