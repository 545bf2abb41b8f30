"""The compiled Mamba-2 recurrence as a torch operator; see ``cpu``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from espalier.nn.kernels import formulas
from espalier.nn.kernels.arguments import SSD_BACKWARD, SSD_FORWARD
from espalier.nn.kernels.cpu import contiguous, register_gradients, rows, width_of
from espalier.nn.kernels.library import call

# Heads of one piece of work share what their group's B and C cost, so there are fewer pieces than in the other kernels.
_WORK_ITEMS = 16


def _inputs(tensors: Sequence[Tensor | None], groups: int, chunk: int) -> dict[str, Any]:
    """Return what both passes need by the kernel's names: ``share`` heads a group, ``parts`` pieces of work a group."""
    x, delta, a, b, c, d, initial = tensors
    assert x is not None and b is not None and c is not None  # noqa: PT018
    x, b, c, (delta, a, d, initial) = rows(x), rows(b), rows(c), contiguous(delta, a, d, initial)
    (batch, length, heads), share = delta.shape, delta.shape[2] // groups
    inputs = {"x": x, "delta": delta, "a": a, "b": b, "c": c, "d": d, "initial": initial}
    return inputs | {
        "batch": batch,
        "length": length,
        "groups": groups,
        "share": share,
        "width": x.shape[2] // heads,
        "states": b.shape[2] // groups,
        "chunk": torch.sym_min(chunk, length),
        "parts": min(share, -(-_WORK_ITEMS // (batch * groups))),
        "x_stride": x.stride(1),
        "b_stride": b.stride(1),
        "c_stride": c.stride(1),
    }


def _outputs(
    x: Tensor, delta: Tensor, b: Tensor, groups: int, chunk: int, state: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return room for (y, the final state if it is wanted, the states between chunks if they are kept)."""
    batch, length, heads = delta.shape
    width, size, block = x.shape[2] // heads, b.shape[2] // groups, width_of(x.dtype)
    # Two numbers more than the states take, so that a graph for any length need not know whether there is one at all.
    kept = batch * heads * ((length - 1) // chunk) * size * (-(-width // block) * block) + 2 if keep else 0
    final = (batch, heads, size, width) if state else (0,)
    return x.new_empty(x.shape), x.new_empty(final), x.new_empty(kept)


_SSD = "Tensor x, Tensor delta, Tensor a, Tensor b, Tensor c, Tensor? d, Tensor? initial"


@torch.library.custom_op(
    "espalier::ssd",
    mutates_args=(),
    schema=f"({_SSD}, SymInt groups, SymInt chunk, bool need_state, bool keep) -> (Tensor, Tensor, Tensor)",
)
def ssd_cpu(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y, final state, states between chunks, which the backward pass needs when ``keep``).

    Heads and groups are flat: x and y are (B, L, H·P), b and c (B, L, G·N), delta (B, L, H), states (B, H, N, P).
    """
    *tensors, groups, chunk, need_state, keep = given
    inputs = _inputs(tensors, groups, chunk)
    y, final, kept = _outputs(inputs["x"], inputs["delta"], inputs["b"], groups, chunk, need_state, keep)
    outputs = {"y": y, "final": final if need_state else None, "kept": kept if keep else None}
    call(SSD_FORWARD, y.dtype, **inputs, **outputs)
    return y, final, kept


@ssd_cpu.register_fake
def _(x: Tensor, delta: Tensor, a: Any, b: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(x, delta, b, *rest[-4:])


@torch.library.custom_op(
    "espalier::ssd_backward",
    mutates_args=(),
    schema=f"({_SSD}, Tensor kept, Tensor dy, Tensor? dfinal, SymInt groups, SymInt chunk) "
    f"-> ({', '.join(['Tensor'] * 7)})",
)
def ssd_backward_cpu(*given: Any) -> tuple[Tensor, ...]:
    """Return the gradients of (x, delta, a, b, c, d, initial state), the last two empty where there is none."""
    *tensors, kept, dy, dfinal, groups, chunk = given
    inputs, (dy, dfinal) = _inputs(tensors, groups, chunk), contiguous(dy, dfinal)
    x, delta, b, initial, parts = (inputs[name] for name in ("x", "delta", "b", "initial", "parts"))
    batch, length, heads = delta.shape
    dx, ddelta = x.new_empty(x.shape), torch.empty_like(delta)
    db, dc = (x.new_empty(batch, parts, length, b.shape[2]) for _ in range(2))
    da, dd = x.new_empty(batch, heads), x.new_empty(batch, heads)
    dinitial = x.new_empty(0) if initial is None else torch.empty_like(initial)
    made = {"kept": kept, "dy": dy, "dfinal": dfinal}
    outputs = {"dx": dx, "ddelta": ddelta, "da": da, "db": db, "dc": dc, "dd": dd}
    call(SSD_BACKWARD, x.dtype, **inputs, **made, **outputs, dinitial=None if initial is None else dinitial)
    db, dc = (t[:, 0] if parts == 1 else t.sum(1) for t in (db, dc))
    return dx, ddelta, da.sum(0), db, dc, dd.sum(0), dinitial


@ssd_backward_cpu.register_fake
def _(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Any, initial: Any, *_: Any) -> tuple[Tensor, ...]:
    first = [t.new_empty(t.shape) for t in (x, delta, a, b, c, a)]
    return (*first, x.new_empty(0 if initial is None else initial.shape))


def _backward(given: Any, made: Any, grads: Any, numbers: Any) -> tuple[Tensor, ...]:
    dy, dfinal, _ = grads
    groups, chunk, need_state, _ = numbers
    found: tuple[Tensor, ...] = ssd_backward_cpu(*given, *made, dy, dfinal if need_state else None, groups, chunk)
    return found


def _formula(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, *rest: Any) -> tuple[Tensor, Tensor | None]:
    d, initial, groups, _, need_state, _ = rest
    x = x.unflatten(2, (delta.shape[2], -1))
    b, c = (t.unflatten(2, (groups, -1)) for t in (b, c))
    y, final = formulas.grouped_ssd(x, delta, a, b, c, d, initial)
    return y.flatten(2), final if need_state else None


register_gradients(ssd_cpu, _backward, _formula, tensors=7, kept=1)
