"""The compiled Mamba-2 recurrence as a torch operator; see ``cpu``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from espalier.nn.kernels import formulas
from espalier.nn.kernels.arguments import SSD_BACKWARD, SSD_FORWARD
from espalier.nn.kernels.cpu import padded, rows
from espalier.nn.kernels.library import call

# Heads of one piece of work share what their group's B and C cost, so there are fewer pieces than in the other kernels.
_WORK_ITEMS = 16


def _shape(x: Tensor, b: Tensor, c: Tensor, heads: int, groups: int, chunk: int) -> dict[str, int]:
    """Return the sizes by the kernel's names: ``share`` heads a group, ``parts`` pieces of work a group."""
    batch, length, _ = x.shape
    share = heads // groups
    return {
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
    x: Tensor, b: Tensor, heads: int, groups: int, chunk: int, state: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return room for (y, the final state if it is wanted, the states between chunks if they are kept)."""
    batch, length, inner = x.shape
    width, size = inner // heads, b.shape[2] // groups
    between = -(-length // torch.sym_min(chunk, length)) - 1
    kept = (batch, heads, between, size, padded(width, x.dtype)) if keep else (0,)
    final = (batch, heads, size, width) if state else (0,)
    return x.new_empty(x.shape), x.new_empty(final), x.new_empty(kept)


def _ready(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, *rest: Tensor | None) -> list[Any]:
    plain = [None if t is None else t.contiguous() for t in (delta, a, *rest)]
    return [rows(x), plain[0], plain[1], rows(b), rows(c), *plain[2:]]


@torch.library.custom_op("espalier::ssd", mutates_args=())
def ssd_cpu(
    x: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    initial: Tensor | None,
    groups: int,
    chunk: int,
    need_state: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y, final state, states between chunks, which the backward pass needs when ``keep``).

    Heads and groups are flat: x and y are (B, L, H·P), b and c (B, L, G·N), delta (B, L, H), states (B, H, N, P).
    """
    x, delta, a, b, c, d, initial = _ready(x, delta, a, b, c, d, initial)
    y, final, kept = _outputs(x, b, delta.shape[2], groups, chunk, need_state, keep)
    inputs = {"x": x, "delta": delta, "a": a, "b": b, "c": c, "d": d, "initial": initial}
    outputs = {"y": y, "final": final if need_state else None, "kept": kept if keep else None}
    call(SSD_FORWARD, x.dtype, **inputs, **outputs, **_shape(x, b, c, delta.shape[2], groups, chunk))
    return y, final, kept


@ssd_cpu.register_fake
def _(
    x: Tensor, delta: Tensor, a: Any, b: Tensor, c: Any, d: Any, initial: Any, groups: int, chunk: int, state: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _outputs(x, b, delta.shape[2], groups, chunk, state, keep)


@torch.library.custom_op("espalier::ssd_backward", mutates_args=())
def ssd_backward_cpu(
    x: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    initial: Tensor | None,
    y: Tensor,
    final: Tensor,
    kept: Tensor,
    dy: Tensor,
    dfinal: Tensor | None,
    groups: int,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of (x, delta, a, b, c, d, initial state), the last two empty where there is none."""
    x, delta, a, b, c, d, initial, dy, dfinal = _ready(x, delta, a, b, c, d, initial, dy, dfinal)
    batch, length, heads = delta.shape
    shape = _shape(x, b, c, heads, groups, chunk)
    dx, ddelta = x.new_empty(x.shape), torch.empty_like(delta)
    db, dc = (x.new_empty(batch, shape["parts"], length, b.shape[2]) for _ in range(2))
    da, dd = x.new_empty(batch, heads), x.new_empty(batch, heads)
    dinitial = x.new_empty(0) if initial is None else torch.empty_like(initial)
    inputs = {"x": x, "delta": delta, "a": a, "b": b, "c": c, "d": d, "initial": initial}
    ends = {"final": None if dfinal is None else final, "dfinal": dfinal}
    kept_by_forward = {"y": y, "kept": kept, "dy": dy, **ends}
    starts = {"dinitial": None if initial is None else dinitial}
    outputs = {"dx": dx, "ddelta": ddelta, "da": da, "db": db, "dc": dc, "dd": dd, **starts}
    call(SSD_BACKWARD, x.dtype, **inputs, **kept_by_forward, **outputs, **shape)
    db, dc = (t[:, 0] if shape["parts"] == 1 else t.sum(1) for t in (db, dc))
    return dx, ddelta, da.sum(0), db, dc, dd.sum(0), dinitial


@ssd_backward_cpu.register_fake
def _(
    x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Any, initial: Any, y: Any, final: Any, kept: Any,
    dy: Any, dfinal: Any, groups: int, chunk: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    first = [t.new_empty(t.shape) for t in (x, delta, a, b, c, a)]
    return (*first, x.new_empty(0 if initial is None else initial.shape))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.groups, ctx.chunk, ctx.need_state, _ = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    dfinal = dfinal if ctx.need_state else None
    if formulas.by_formula() or saved[9].ndim == 1:  # or nothing was kept: no gradient was expected then
        found = formulas.differentiate(lambda *t: _formula(*t, groups=ctx.groups), saved[:7], (dy, dfinal))
        return (*found, None, None, None, None)
    if dy is None:
        dy = torch.zeros_like(saved[7])
    *grads, dd, dinitial = ssd_backward_cpu(*saved, dy, dfinal, ctx.groups, ctx.chunk)
    none = [None if given is None else grad for given, grad in zip(saved[5:7], (dd, dinitial), strict=True)]
    return (*grads, *none, None, None, None, None)


def _formula(
    x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, initial: Tensor | None, *, groups: int
) -> tuple[Tensor, Tensor]:
    x = x.unflatten(2, (delta.shape[2], -1))
    b, c = (t.unflatten(2, (groups, -1)) for t in (b, c))
    y, final = formulas.grouped_ssd(x, delta, a, b, c, d, initial)
    return y.flatten(2), final


ssd_cpu.register_autograd(_backward, setup_context=_setup)
