"""Torch's wrappers around a network: what torch.compile, DataParallel and others made computes what is inside."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from espalier.certify import code
from espalier.certify.refusal import UncertifiableError

_INSIDE = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module",
           "AveragedModel": "module"}  # fmt: skip
"""By name: where the module inside is."""


def unwrapped(net: nn.Module, wrappers: dict[str, None]) -> nn.Module:
    """Return the module inside all wrappers, and note these.

    Raises:
        UncertifiableError: a wrapper does more than call the module inside.
    """
    while type(net).__module__.startswith("torch.") and type(net).__name__ in _INSIDE:
        kind = type(net).__name__
        own = _is_compiled(net) if kind == "OptimizedModule" else code.is_bare(net) and "forward" not in vars(net)
        torch_s = _is_torch_s(type(net).__call__) and _is_torch_s(type(net).forward)
        hooks = net._forward_hooks or net._forward_pre_hooks
        if not (own and torch_s) or hooks or getattr(net, "mixed_precision", None):
            raise UncertifiableError("it does more than call the module inside (hooks, a patch or mixed precision): "
                                     "put these on the module inside, or certify that one", kind)  # fmt: skip
        wrappers[kind] = None
        net = getattr(net, _INSIDE[kind])
    return net


def _is_compiled(net: nn.Module) -> bool:
    """Return whether the forward pass on an instance is the one that torch.compile put there, of the module inside."""
    inside, forward = net._modules["_orig_mod"], vars(net).get("forward")
    origin = getattr(forward, "_torchdynamo_orig_callable", None)
    if origin is None or not hasattr(origin, "__code__"):
        return forward is None or inside in (origin, getattr(origin, "__self__", None))
    return _is_torch_s(origin) and any(cell.cell_contents is inside for cell in origin.__closure__ or ())


def _is_torch_s(function: Any) -> bool:
    """Return whether a function was written in a file of torch, whatever it says."""
    written = getattr(getattr(function, "__func__", function), "__code__", None)
    return written is not None and written.co_filename.startswith(torch.__path__[0])
