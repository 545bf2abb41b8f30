"""The compiled C++ kernels as torch operators, so that autograd, ``torch.compile`` and export see through them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from espalier.nn.kernels import formulas
from espalier.nn.kernels.arguments import CONV_BACKWARD, CONV_FORWARD, SCAN_BACKWARD, SCAN_FORWARD
from espalier.nn.kernels.library import call
from espalier.nn.precision import is_exporting

# Enough pieces of work for any number of threads, fixed so that results do not depend on it.
WORK_ITEMS = 32


def needs_grad(*tensors: Tensor | None) -> bool:
    """Return whether a backward pass may follow, for which a kernel has to keep something."""
    # A graph that is traced without gradients may be trained later.
    if torch.jit.is_tracing() or is_exporting():
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _width(dtype: torch.dtype) -> int:
    return 16 if dtype == torch.float32 else 8


def padded(size: int, dtype: torch.dtype) -> int:
    """Return ``size`` rounded up to whole blocks of the kernels' vectors."""
    return -(-size // _width(dtype)) * _width(dtype)


def _scan_shape(x_BLE: Tensor, states: int, gate: Tensor | None = None, softplus: bool = False) -> dict[str, int]:
    """Return the sizes by the kernel's names: ``piece`` steps at a time, ``groups`` of channel blocks."""
    batch, length, channels = x_BLE.shape
    blocks = -(-channels // _width(x_BLE.dtype))
    return {
        "batch": batch,
        "length": length,
        "channels": channels,
        "states": states,
        "piece": torch.sym_min(length, max(8, min(64, 512 // states))),
        "groups": torch.sym_min(blocks, -(-WORK_ITEMS // batch)),
        "gate_stride": 0 if gate is None else gate.stride(1),
        "softplus": int(softplus),
    }


def _scan_outputs(x_BLE: Tensor, a_EN: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return room for (y, final state, states at the start of each piece if they are kept)."""
    batch, length, channels = x_BLE.shape
    states, piece, width = a_EN.shape[1], _scan_shape(x_BLE, a_EN.shape[1])["piece"], _width(x_BLE.dtype)
    # In one axis: a graph for any length must not depend on whether there is more than one piece.
    kept = batch * -(-length // piece) * -(-channels // width) * states * width if keep else 0
    return x_BLE.new_empty(x_BLE.shape), x_BLE.new_empty(batch, channels, states), x_BLE.new_empty(kept)


@torch.library.custom_op("espalier::selective_scan", mutates_args=())
def selective_scan_cpu(
    x: Tensor,
    delta: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    gate: Tensor | None,
    initial: Tensor | None,
    softplus: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y, final state, states at the start of each piece, which the backward pass needs when ``keep``).

    Δ is ``delta``, or softplus(delta + bias) with ``softplus``.
    """
    x, delta, a, b, c = (t.contiguous() for t in (x, delta, a, b, c))
    bias, d, initial = (None if t is None else t.contiguous() for t in (bias, d, initial))
    gate = None if gate is None else rows(gate)
    y, final, starts = _scan_outputs(x, a, keep)
    inputs = {"x": x, "delta": delta, "bias": bias, "a": a, "b": b, "c": c, "d": d, "gate": gate, "initial": initial}
    outputs = {"y": y, "final": final, "starts": starts if keep else None}
    call(SCAN_FORWARD, x.dtype, **inputs, **outputs, **_scan_shape(x, a.shape[1], gate, softplus))
    return y, final, starts


@selective_scan_cpu.register_fake
def _(x: Tensor, delta: Any, bias: Any, a: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _scan_outputs(x, a, keep=rest[-1])


@torch.library.custom_op("espalier::selective_scan_backward", mutates_args=())
def selective_scan_backward_cpu(
    x: Tensor,
    delta: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    gate: Tensor | None,
    starts: Tensor,
    dy: Tensor,
    df: Tensor | None,
    softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of (x, delta, bias, a, b, c, d, gate, initial state); that of no gate is empty."""
    x, delta, a, b, c, dy = (t.contiguous() for t in (x, delta, a, b, c, dy))
    bias, d, df = (None if t is None else t.contiguous() for t in (bias, d, df))
    gate = None if gate is None else rows(gate)
    shape = _scan_shape(x, a.shape[1], gate, softplus)
    batch, length, channels, states, groups = *x.shape, a.shape[1], shape["groups"]
    dx, ddelta, dgate = torch.empty_like(x), torch.empty_like(x), x.new_empty(0 if gate is None else x.shape)
    da, dinitial = x.new_empty(batch, channels, states), x.new_empty(batch, channels, states)
    db, dc = (x.new_empty(batch, groups, length, states) for _ in range(2))
    dd, dbias = (x.new_empty(batch, channels) for _ in range(2))
    inputs = {"x": x, "delta": delta, "bias": bias, "a": a, "b": b, "c": c, "d": d, "gate": gate, "starts": starts}
    outputs = {"dx": dx, "ddelta": ddelta, "dbias": dbias, "da": da, "db": db, "dc": dc, "dd": dd}
    rest = {"dy": dy, "dfinal": df, "dgate": None if gate is None else dgate, "dinitial": dinitial}
    call(SCAN_BACKWARD, x.dtype, **inputs, **outputs, **rest, **shape)
    return dx, ddelta, dbias.sum(0), da.sum(0), db.sum(1), dc.sum(1), dd.sum(0), dgate, dinitial


@selective_scan_backward_cpu.register_fake
def _(x: Tensor, delta: Tensor, bias: Any, a: Tensor, b: Tensor, c: Tensor, d: Any, gate: Any, *_: Any) -> Any:
    dx, ddelta, da, db, dc = (t.new_empty(t.shape) for t in (x, delta, a, b, c))
    dbias, dd = (x.new_empty(x.shape[2]) for _ in range(2))
    dgate, dinitial = x.new_empty(0 if gate is None else x.shape), x.new_empty(x.shape[0], *a.shape)
    return dx, ddelta, dbias, da, db, dc, dd, dgate, dinitial


def _scan_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.softplus, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)


def _scan_backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *inputs, starts = ctx.saved_tensors
    if formulas.by_formula() or not starts.numel():  # or nothing was kept: no gradient was expected then
        found = formulas.differentiate(lambda *t: _scan_formula(*t, softplus=ctx.softplus), inputs, (dy, dfinal))
        return (*found, None, None)
    if dy is None:
        dy = torch.zeros_like(inputs[0])
    grads = selective_scan_backward_cpu(*inputs[:8], starts, dy, dfinal, ctx.softplus)
    asked = [None if given is None else grad for given, grad in zip(inputs, grads, strict=True)]
    return (*asked, None, None)


def _scan_formula(
    x: Tensor,
    delta: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    gate: Tensor | None,
    initial: Tensor | None,
    *,
    softplus: bool,
) -> tuple[Tensor, Tensor]:
    if softplus:
        delta = F.softplus(delta if bias is None else delta + bias)
    y, final = formulas.selective_scan(x, delta, a, b, c, initial)
    y = y if d is None else y + d * x
    return (y if gate is None else y * formulas.silu(gate)), final


selective_scan_cpu.register_autograd(_scan_backward, setup_context=_scan_setup)


def _conv_shape(x_BLC: Tensor, taps: int) -> dict[str, int]:
    batch, length, channels = x_BLC.shape
    return {"batch": batch, "length": length, "channels": channels, "taps": taps, "stride": x_BLC.stride(1)}


def rows(x_BLC: Tensor) -> Tensor:
    """Return x with rows that lie evenly apart over batch and time, without copying a slice of a wider tensor."""
    batch_step, row_step, step = x_BLC.stride()
    even = step == 1 and (x_BLC.shape[0] == 1 or batch_step == x_BLC.shape[1] * row_step)
    return x_BLC if even and row_step >= x_BLC.shape[2] else x_BLC.contiguous()


@torch.library.custom_op("espalier::causal_conv_silu", mutates_args=())
def causal_conv_silu_cpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return SiLU of the causal depthwise convolution of x (B, L, C) with ``weight`` (C, K), the newest tap last."""
    x, weight = rows(x), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty(x.shape)
    call(CONV_FORWARD, x.dtype, x=x, weight=weight, bias=bias, y=y, **_conv_shape(x, weight.shape[1]))
    return y


@causal_conv_silu_cpu.register_fake
def _(x: Tensor, weight: Tensor, bias: Any) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("espalier::causal_conv_silu_backward", mutates_args=())
def causal_conv_silu_backward_cpu(
    x: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of (x, weight, bias)."""
    x, weight, dy = rows(x), weight.contiguous(), dy.contiguous()
    bias = None if bias is None else bias.contiguous()
    batch, _, channels = x.shape
    dx = x.new_empty(x.shape)
    dweight, dbias = x.new_empty(batch, channels, weight.shape[1]), x.new_empty(batch, channels)
    tensors = {"x": x, "weight": weight, "bias": bias, "dy": dy, "dx": dx, "dweight": dweight, "dbias": dbias}
    call(CONV_BACKWARD, x.dtype, **tensors, **_conv_shape(x, weight.shape[1]))
    return dx, dweight.sum(0), dbias.sum(0)


@causal_conv_silu_backward_cpu.register_fake
def _(x: Tensor, weight: Tensor, bias: Any, dy: Any) -> Any:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), x.new_empty(x.shape[2])


def _conv_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _conv_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    if formulas.by_formula():
        return tuple(formulas.differentiate(formulas.causal_conv_silu, (x, weight, bias), (dy,)))
    dx, dweight, dbias = causal_conv_silu_backward_cpu(x, weight, bias, dy)
    return dx, dweight, None if bias is None else dbias


causal_conv_silu_cpu.register_autograd(_conv_backward, setup_context=_conv_setup)
