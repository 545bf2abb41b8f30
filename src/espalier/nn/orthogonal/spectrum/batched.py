"""Backward passes for gradients that come in batches: ``is_grads_batched=True``, Jacobians with ``vectorize=True``.

Such a gradient is one tensor that stands for many and has no memory of its own: kernels cannot read it, and what writes
into tensors made for one gradient cannot hold it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from espalier.nn.precision import is_batched


class _Followed(TorchDispatchMode):
    """Changes nothing, and while it is on ``is_tracing`` says so: plain operations run, and nothing in place."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def takes_batches(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Run ``backward(ctx, *gradients)`` by its plain formula, that of ``is_tracing``, if the gradients are batched."""

    @functools.wraps(backward)
    def run(ctx: Any, *gradients: Any) -> Any:
        if not is_batched():
            return backward(ctx, *gradients)
        with _Followed():
            return backward(ctx, *gradients)

    return run
