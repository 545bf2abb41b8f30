"""What runs around a layer's own code, and may change its weights or what it computes."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from types import CellType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from espalier.init.layouts.registry import Skipped
from espalier.init.layouts.scratch import has_own_forward, leaves, memo_of_copy

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
        if has_own_forward(part):
            around.append((vars(part)["forward"], "a replaced forward", "in place of", "what it computes"))
        for hook, thing, when, what in around:
            inner = hook.func if isinstance(hook, functools.partial) else hook
            home = str(getattr(inner, "__module__", None) or type(inner).__module__)
            if not home.startswith(_CARRIERS) and not (when == "after" and _only_looks(hook, part)):
                words = f"{thing} ({getattr(inner, '__name__', type(inner).__name__)}) runs {when} each call"
                return Skipped(kind, f"{words} and may change {what}: remove it, write, put it back")
    return None


def _only_looks(hook: Callable[..., Any], part: nn.Module) -> bool:
    """Return whether a hook leaves a result and the weights alone: a twin of it is tried on a twin of the part.

    A hook may write to the part that it is given, or to what it names (its last output, a running mean, a list): these
    never meet what is made up here.
    """
    weight = part._parameters.get("weight")
    width = len(weight) if isinstance(weight, Tensor) and weight.ndim else 8
    result = torch.randn(1, 4, width, generator=torch.Generator().manual_seed(4), device="cpu")
    given = result.clone()
    try:
        memo = memo_of_copy(part)
        copied = copy.deepcopy(part, memo).cpu()
        twin = _twin(hook, memo) if isinstance(hook, FunctionType) else copy.deepcopy(hook, memo)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            returned = twin(copied, (given.clone(),), given)
        kept = all(map(torch.equal, copied.parameters(), (parameter.cpu() for parameter in part.parameters())))
    except Exception:  # anyone's code
        return False
    return kept and torch.equal(given, result) and (returned is None or returned is given)


def _twin(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    """Return a function of the same code over copies of what it closes over and of what it names in its module."""
    known, code = function.__globals__, function.__code__
    named = {name: known[name] for name in code.co_names if name in known and not isinstance(known[name], ModuleType)}
    held = [cell.cell_contents for cell in function.__closure__ or ()]
    # What earlier passes left in a list belongs to a graph, which torch does not copy.
    memo.update((id(tensor), tensor.detach().clone()) for tensor in leaves([named, held]) if not tensor.is_leaf)
    parts = (held, named, function.__defaults__, function.__kwdefaults__)
    held, named, defaults, by_keyword = copy.deepcopy(parts, memo)
    twin = FunctionType(code, known | named, function.__name__, defaults, tuple(map(CellType, held)))
    twin.__kwdefaults__ = by_keyword
    return twin
