"""What runs around a layer's own code, and may change its weights or what it computes."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from espalier.init.layouts.registry import Skipped

# Libraries whose hooks around a call gather, move or watch and change nothing.
_CARRIERS = (
    "torch.distributed", "torch.utils.", "accelerate.", "deepspeed.", "lightning.", "pytorch_lightning.",
    "transformers.", "wandb.", "espalier.",
)  # fmt: skip


def refuse_hooked(module: nn.Module, kind: str) -> Skipped | None:
    """Return why nothing is written where a hook runs before a call, or after one of a part, or forward was replaced.

    One before a call may write the weights anew, which cannot be known without running it, and it may do anything. One
    after a call is let pass if it leaves a made-up result alone: most of these only look.
    """
    for part in module.modules():
        around = [(hook, "a hook", "before", "its weights") for hook in part._forward_pre_hooks.values()]
        if part is not module:  # what comes of the layer's own result is outside of it
            around += [(hook, "a hook", "after", "what it computes") for hook in part._forward_hooks.values()]
        if "forward" in vars(part):
            around.append((vars(part)["forward"], "a replaced forward", "in place of", "what it computes"))
        for hook, thing, when, what in around:
            inner = hook.func if isinstance(hook, functools.partial) else hook
            home = str(getattr(inner, "__module__", None) or type(inner).__module__)
            if not home.startswith(_CARRIERS) and not (when == "after" and _only_looks(hook, part)):
                words = f"{thing} ({getattr(inner, '__name__', type(inner).__name__)}) runs {when} each call"
                return Skipped(kind, f"{words} and may change {what}: remove it, write, put it back")
    return None


def _only_looks(hook: Callable[..., Any], part: nn.Module) -> bool:
    """Return whether a hook leaves a result alone: a twin of it is tried, with copies of what it closes over."""
    weight = getattr(part, "weight", None)
    width = len(weight) if isinstance(weight, Tensor) and weight.ndim else 8
    result = torch.randn(1, 4, width, generator=torch.Generator().manual_seed(4), device="cpu")
    given = result.clone()
    twin: Callable[..., Any]
    try:
        memo: dict[int, Any] = {id(module): module for module in part.modules()}
        if isinstance(hook, FunctionType):
            cells = tuple(CellType(copy.deepcopy(cell.cell_contents, memo)) for cell in hook.__closure__ or ())
            twin = FunctionType(hook.__code__, hook.__globals__, hook.__name__, hook.__defaults__, cells)
            twin.__kwdefaults__ = hook.__kwdefaults__
        else:
            twin = copy.deepcopy(hook, memo)
        with torch.no_grad():
            returned = twin(part, (given.clone(),), given)
    except Exception:  # anyone's code
        return False
    return torch.equal(given, result) and (returned is None or returned is given)
