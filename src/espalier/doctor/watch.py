"""What happens inside a forward pass: sizes of activations, dead and saturated units, entropy of attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from espalier.doctor.record import plain_name

_RECTIFIERS = (F.relu, F.relu_, F.relu6, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)
_SQUASHERS = (torch.tanh, torch.sigmoid, Tensor.tanh, Tensor.sigmoid, F.tanh, F.sigmoid)
_SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)
# Queries whose attention is looked at; entropies of a sample are enough.
_QUERIES = 64


@dataclass
class Activity:
    """What one forward pass showed, by module name, in the order of the calls.

    Attributes:
        sizes: root mean square of every module's output; infinite or NaN where it is not finite.
        dead: share of units that are zero for every position of the batch, after each rectifier.
        saturated: share of entries within 0.01 of the bounds, after each tanh or sigmoid.
        entropy: mean entropy of attention over ln(number of visible keys), 1 being uniform.
    """

    sizes: dict[str, float] = field(default_factory=dict)
    dead: dict[str, float] = field(default_factory=dict)
    saturated: dict[str, float] = field(default_factory=dict)
    entropy: dict[str, float] = field(default_factory=dict)


class _Operators(TorchFunctionMode):
    """Looks at rectifiers, squashing functions and attention, wherever in a module's code they are called."""

    def __init__(self, activity: Activity, place: Callable[[], str]) -> None:
        super().__init__()
        self.activity, self.place = activity, place

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            if func in _RECTIFIERS:
                _note(self.activity.dead, self.place(), _dead_share(out))
            elif func in _SQUASHERS:
                low = 0.0 if func in (torch.sigmoid, Tensor.sigmoid, F.sigmoid) else -1.0
                _note(self.activity.saturated, self.place(), float(((out < low + 0.01) | (out > 0.99)).float().mean()))
            elif func in _SOFTMAX and isinstance(out, Tensor) and out.ndim == 4 and out.shape[-1] > 1:
                _note(self.activity.entropy, self.place(), _relative_entropy(out))
            elif func is F.scaled_dot_product_attention:
                _note(self.activity.entropy, self.place(), _attention_entropy(*args, **kwargs))
        return out


@contextmanager
def watch(model: nn.Module) -> Iterator[Activity]:
    """Record what a forward pass inside the ``with`` block does; hooks and modes are gone after it."""
    activity = Activity()
    stack: list[str] = [""]
    handles = []
    for name, module in model.named_modules():
        short = plain_name(name)
        handles.append(module.register_forward_pre_hook(lambda _m, _i, short=short: stack.append(short)))

        def leave(_module: nn.Module, _inputs: Any, output: Any, short: str = short) -> None:
            stack.pop()
            tensor = next((t for t in _tensors(output) if t.is_floating_point()), None)
            if tensor is not None and tensor.numel():
                activity.sizes[short] = float(tensor.detach().double().square().mean().sqrt())

        handles.append(module.register_forward_hook(leave))
    try:
        with _Operators(activity, lambda: stack[-1]):
            yield activity
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _tensors(value)


def _note(table: dict[str, float], name: str, value: float | None) -> None:
    # Of several calls in one module the worst counts: the least spread attention, the most dead units.
    if value is not None and not math.isnan(value):
        worse = min if table is not None and name in table and value < table[name] and value <= 1 else max
        table[name] = value if name not in table else worse(table[name], value)


def _dead_share(out: Tensor) -> float | None:
    """Return the share of units that are zero everywhere; ``None`` for too few positions to tell."""
    units = out.transpose(1, -1) if out.ndim == 4 else out
    flat = units.reshape(-1, units.shape[-1]) if units.ndim > 1 else units.reshape(1, -1)
    return float((flat == 0).all(0).float().mean()) if len(flat) >= 16 else None


def _relative_entropy(p: Tensor) -> float | None:
    """Return the mean over queries of entropy / ln(visible keys), leaving out queries with fewer than four."""
    p = p[..., -_QUERIES:, :].double()
    keys = (p > 0).sum(-1)
    entropy = -(p * p.clamp_min(1e-300).log()).sum(-1)
    enough = keys >= 4
    if not bool(enough.any()):
        return None
    return float((entropy[enough] / keys[enough].double().log()).mean())


def _attention_entropy(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, **_: Any,
) -> float | None:  # fmt: skip
    if k.shape[-2] < 4 or q.ndim < 3:
        return None
    if q.ndim == 4 and k.shape[1] != q.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    start = max(0, q.shape[-2] - _QUERIES)
    scores = q[..., start:, :].float() @ k.float().mT * (scale or q.shape[-1] ** -0.5)
    if is_causal:
        rows = torch.arange(start, q.shape[-2], device=q.device)[:, None]
        scores = scores.masked_fill(torch.arange(k.shape[-2], device=q.device) > rows, -torch.inf)
    elif attn_mask is not None:
        part = attn_mask[..., start:, :] if attn_mask.shape[-2] == q.shape[-2] else attn_mask
        scores = scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part
    return _relative_entropy(scores.softmax(-1).nan_to_num(0.0))
