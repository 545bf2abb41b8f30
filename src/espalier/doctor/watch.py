"""What happens inside a forward pass: sizes of activations, dead and saturated units, entropy of attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from espalier.doctor.stats import dense, root_mean_square
from espalier.init.matching import plain_name

_RECTIFIERS = (F.relu, F.relu_, F.relu6, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)
_SQUASHERS = (torch.tanh, torch.sigmoid, Tensor.tanh, Tensor.sigmoid, F.tanh, F.sigmoid)
_SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)
# Layers whose outputs have their channels second.
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Queries whose attention is looked at; entropies of a sample are enough.
_QUERIES = 64
# Weight on a query's own position from which its softmax is at its bound: the gradient is a hundredth.
_SATURATED = 0.99
# Positions of a batch that tell how far outputs vary over it.
_POSITIONS = 1024


@dataclass
class Activity:
    """What one forward pass showed, by module name, in the order of the calls.

    Attributes:
        sizes: root mean square of every module's output; infinite or NaN where it is not finite.
        dead: share of units that are zero for every position of the batch, after each rectifier.
        saturated: share of entries within 0.01 of the bounds after each tanh, within 0.002 after each sigmoid.
        entropy: mean entropy of attention over ln(number of visible keys), 1 being uniform.
        inputs: root mean square of the first input of every module with parameters of its own.
        constant: of every layer with a bias, the size of its outputs' mean over the positions of the batch, and that
            of their deviation.
        made: the nodes of the graph that gave the outputs of layers with a bias.
        read: the nodes whose outputs layers take.
    """

    sizes: dict[str, float] = field(default_factory=dict)
    dead: dict[str, float] = field(default_factory=dict)
    saturated: dict[str, float] = field(default_factory=dict)
    entropy: dict[str, float] = field(default_factory=dict)
    inputs: dict[str, float] = field(default_factory=dict)
    constant: dict[str, tuple[float, float]] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)
    read: list[Any] = field(default_factory=list)

    @property
    def broken(self) -> str | None:
        """The first module whose output is not finite, if there is one."""
        return next((name for name, size in self.sizes.items() if not math.isfinite(size)), None)

    def growth(self, name: str) -> float | None:
        """Return how many times larger a module's output is than its input; ``None`` where that is unknown."""
        size, start = self.sizes.get(name), self.inputs.get(name)
        return size / start if size is not None and start else None

    def is_read(self, name: str) -> bool:
        """Return whether another layer takes what was computed from a layer's output: no last one's is."""
        goal, seen, open_nodes = self.made.get(name), set(), list(self.read)
        while goal is not None and open_nodes:
            node = open_nodes.pop()
            if node is goal:
                return True
            if node is not None and node not in seen:
                seen.add(node)
                open_nodes += [earlier for earlier, _ in node.next_functions]
        return False


class _Operators(TorchFunctionMode):
    """Looks at rectifiers, squashing functions and attention, wherever in a module's code they are called."""

    def __init__(self, activity: Activity, place: Callable[[], str]) -> None:
        super().__init__()
        self.activity, self.place = activity, place

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not all(dense(tensor) for tensor in _tensors((out, args, kwargs))):
            return out
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            if func in _RECTIFIERS:
                _note(self.activity.dead, self.place(), _dead_share(out), max)
            elif func in _SQUASHERS:
                # Gates start up to five from zero on purpose, 0.007 from a bound of the sigmoid.
                low, near = (0.0, 0.002) if func in (torch.sigmoid, Tensor.sigmoid, F.sigmoid) else (-1.0, 0.01)
                share = float(((out < low + near) | (out > 1 - near)).float().mean())
                _note(self.activity.saturated, self.place(), share, max)
            elif func in _SOFTMAX and args and isinstance(out, Tensor) and out.ndim == 4 and out.shape[-1] > 1:
                _note(self.activity.entropy, self.place(), _relative_entropy(args[0], out.shape[-2]), min)
            elif func is F.scaled_dot_product_attention:
                _note(self.activity.entropy, self.place(), _attention_entropy(*args, **kwargs), min)
        return out


@contextmanager
def watch(model: nn.Module) -> Iterator[Activity]:
    """Record what a forward pass inside the ``with`` block does; hooks and modes are gone after it."""
    activity = Activity()
    stack: list[str] = [""]
    handles = []
    for name, module in model.named_modules():
        short = plain_name(name)
        if isinstance(module, torch.jit.ScriptModule):  # it takes no hooks
            continue

        def enter(module: nn.Module, inputs: Any, keywords: Any, short: str = short) -> None:
            stack.append(short)
            tensor = _first_real((inputs, keywords)) if module._parameters else None
            if tensor is not None:
                activity.inputs[short] = root_mean_square(tensor)
                if _has_matrix(module):
                    activity.read.append(tensor.grad_fn)

        def leave(module: nn.Module, _inputs: Any, output: Any, short: str = short) -> None:
            stack.pop()
            tensor = _first_real(output)
            if tensor is not None:
                activity.sizes[short] = root_mean_square(tensor)
                if _has_matrix(module) and any("bias" in own for own in module._parameters):
                    _note_constant(activity, short, tensor, channels_second=isinstance(module, _CONVOLUTIONS))

        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
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
    elif is_dataclass(output):
        yield from _tensors(vars(output))


def floating(values: Any) -> Iterator[Tensor]:
    """Yield the tensors of real or complex numbers among outputs or arguments."""
    return (t for t in _tensors(values) if dense(t) and (t.is_floating_point() or t.is_complex()) and t.numel())


def _first_real(values: Any) -> Tensor | None:
    return next((tensor for tensor in floating(values) if not tensor.is_complex()), None)


def _has_matrix(module: nn.Module) -> bool:
    return any(own is not None and own.ndim > 1 for own in module._parameters.values())


def _note_constant(activity: Activity, name: str, output: Tensor, *, channels_second: bool) -> None:
    """Note the size of the mean over positions of the batch and of the deviation from it, for a layer's first call."""
    if output.ndim < 2 + channels_second or name in activity.constant:
        return
    rows = output.detach()
    rows = rows.flatten(2).mT if channels_second else rows.unsqueeze(1).flatten(1, -2)
    rows = rows[:, :: -(-rows.shape[0] * rows.shape[1] // _POSITIONS)]
    units = rows.reshape(-1, rows.shape[-1])
    if len(units) >= 16:
        variance, mean = torch.var_mean(units.double(), 0, correction=0)
        activity.constant[name] = (root_mean_square(mean), float(variance.mean().sqrt()))
        activity.made[name] = output.grad_fn


def _note(table: dict[str, float], name: str, value: float | None, worse: Callable[[float, float], float]) -> None:
    # Of several calls within one module the worst counts.
    if value is not None and not math.isnan(value):
        table[name] = worse(table.get(name, value), value)


def _dead_share(out: Tensor) -> float | None:
    """Return the share of units that are zero everywhere; ``None`` for too few positions, and where it is chance.

    Where the inputs all but agree, a unit is on for all of them or off for all, each as likely.
    """
    if out.ndim < 2 or not out.numel():
        return None
    flat = out.movedim(_axis_of_units(out), -1).flatten(0, -2) != 0
    if len(flat) < 16:
        return None
    dead, lit = int((~flat.any(0)).sum()), int(flat.all(0).sum())
    share = dead / flat.shape[1]
    chance = (dead - lit) ** 2 < 6 * (dead + lit) or dead < lit
    return 0.0 if chance and share < 0.95 else share


def _axis_of_units(out: Tensor) -> int:
    """Return along which dimension a rectifier's units lie: the second right behind a convolution, else the last."""
    node = out.grad_fn
    for _ in range(8):
        name = "" if node is None else node.name()
        if "Convolution" in name:
            return 1
        if node is None or "mm" in name or "Transpose" in name or "Permute" in name:
            break
        node = next((earlier for earlier, _ in node.next_functions if earlier is not None), None)
    # Without an earlier layer to tell, four dimensions are an image's.
    return 1 if node is None and out.ndim == 4 else -1


def _relative_entropy(scores: Tensor, positions: int) -> float | None:
    """Return the mean over queries of entropy / ln(visible keys), leaving out queries that see fewer than four.

    Masks write −∞, the most negative number, or −10,000. A query that sees its own position is what a start near the
    identity asks for: as long as its softmax still passes a gradient, the keys of the other positions count.
    ``positions`` is the number of queries, of which ``scores`` may hold the last ones.
    """
    scores = scores[..., -_QUERIES:, :].double()
    keys = (scores > -9999).sum(-1)
    enough = keys >= 4
    if not bool(enough.any()):
        return None
    p = scores.softmax(-1)
    entropy = _mean_entropy(p, keys, enough)
    if positions == scores.shape[-1]:
        own = torch.eye(positions, dtype=torch.bool, device=scores.device)[-scores.shape[-2] :]
        if float(p.masked_fill(~own, 0).sum(-1)[enough].mean()) < _SATURATED:
            return max(entropy, _mean_entropy(scores.masked_fill(own, -torch.inf).softmax(-1), keys - 1, enough))
    return entropy


def _mean_entropy(p: Tensor, keys: Tensor, counted: Tensor) -> float:
    entropy = -(p * p.clamp_min(1e-300).log()).sum(-1)
    return float((entropy[counted] / keys[counted].double().log()).mean())


def _attention_entropy(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, **_: Any,
) -> float | None:  # fmt: skip
    q, k = query, key  # torch's own names above: they may be passed by name
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
        part = attn_mask[..., start:, :] if attn_mask.ndim > 1 and attn_mask.shape[-2] == q.shape[-2] else attn_mask
        scores = scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part
    return _relative_entropy(scores, q.shape[-2])
