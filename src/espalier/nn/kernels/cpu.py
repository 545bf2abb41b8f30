"""The compiled C++ kernels as torch operators, so that autograd, ``torch.compile`` and export see through them.

The inputs of an operator are tensors, None for one that is missing, then numbers; each is listed once, in its schema.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

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


def width_of(dtype: torch.dtype) -> int:
    """Return how many numbers the kernels take together: one block of vectors."""
    return 16 if dtype == torch.float32 else 8


def contiguous(*tensors: Tensor | None) -> list[Any]:
    """Return the tensors in contiguous memory."""
    return [None if t is None else t.contiguous() for t in tensors]


def rows(x_BLC: Tensor) -> Tensor:
    """Return x with rows that lie evenly apart over batch and time, without copying a slice of a wider tensor."""
    batch_step, row_step, step = x_BLC.stride()
    even = step == 1 and (x_BLC.shape[0] == 1 or batch_step == x_BLC.shape[1] * row_step)
    return x_BLC if even and row_step >= x_BLC.shape[2] else x_BLC.contiguous()


def register_gradients(
    operator: Any, backward: Callable[..., Any], formula: Callable[..., Any], tensors: int, kept: int = 0
) -> None:
    """Register how the gradients of an operator are computed.

    Args:
        operator: its first output has the shape of its first input. Where outputs are kept, its last input says so.
        backward: takes (inputs, outputs kept, gradients of the outputs, numbers), and returns the inputs' gradients.
        formula: takes the inputs and returns the outputs that have gradients.
        tensors: how many of the inputs are tensors.
        kept: how many of the outputs, the last ones, ``backward`` reads.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.numbers = inputs[tensors:]
        ctx.save_for_backward(*inputs[:tensors], *(output[-kept:] if kept else ()))
        ctx.set_materialize_grads(False)

    def run(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: checkpointing computes anew what it gives
        given, outputs = saved[:tensors], saved[tensors:]
        found: Sequence[Tensor | None]
        if formulas.by_formula() or (kept and not ctx.numbers[-1]):  # nothing was kept: no gradient was expected then
            found = formulas.differentiate(lambda *t: formula(*t, *ctx.numbers), given, grads)
        else:
            dy = torch.zeros_like(given[0]) if grads[0] is None else grads[0]
            found = backward(given, outputs, (dy, *grads[1:]), ctx.numbers)
        asked = (None if tensor is None else grad for tensor, grad in zip(given, found, strict=True))
        return *asked, *(None for _ in ctx.numbers)

    operator.register_autograd(run, setup_context=setup)


def _scan_shape(x_BLE: Tensor, states: int) -> dict[str, Any]:
    """Return the sizes by the kernel's names: ``piece`` steps at a time, ``groups`` of channel blocks."""
    batch, length, channels = x_BLE.shape
    blocks = -(-channels // width_of(x_BLE.dtype))
    return {
        "batch": batch,
        "length": length,
        "channels": channels,
        "states": states,
        "piece": torch.sym_min(length, max(8, min(64, 512 // states))),
        "groups": torch.sym_min(blocks, -(-WORK_ITEMS // batch)),
    }


def _scan_inputs(tensors: Sequence[Tensor | None], softplus: bool) -> dict[str, Any]:
    """Return what both passes need by the kernel's names: the tensors as it reads them, and sizes."""
    *others, gate = tensors
    x, delta, bias, a, b, c, d = contiguous(*others)
    gate = None if gate is None else rows(gate)
    inputs = {"x": x, "delta": delta, "bias": bias, "a": a, "b": b, "c": c, "d": d, "gate": gate}
    flags = {"gate_stride": 0 if gate is None else gate.stride(1), "softplus": int(softplus)}
    return inputs | flags | _scan_shape(x, a.shape[1])


def _scan_outputs(x_BLE: Tensor, a_EN: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return room for (y, final state, states at the start of each piece if they are kept)."""
    batch, length, channels = x_BLE.shape
    states, piece, width = a_EN.shape[1], _scan_shape(x_BLE, a_EN.shape[1])["piece"], width_of(x_BLE.dtype)
    # In one axis: a graph for any length must not depend on whether there is more than one piece.
    kept = batch * -(-length // piece) * -(-channels // width) * states * width if keep else 0
    return x_BLE.new_empty(x_BLE.shape), x_BLE.new_empty(batch, channels, states), x_BLE.new_empty(kept)


_SCAN = "Tensor x, Tensor delta, Tensor? bias, Tensor a, Tensor b, Tensor c, Tensor? d, Tensor? gate"


@torch.library.custom_op(
    "espalier::selective_scan",
    mutates_args=(),
    schema=f"({_SCAN}, Tensor? initial, bool softplus, bool keep) -> (Tensor, Tensor, Tensor)",
)
def selective_scan_cpu(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y, final state, states at the start of each piece, which the backward pass needs when ``keep``).

    Δ is ``delta``, or softplus(delta + bias) with ``softplus``.
    """
    *tensors, initial, softplus, keep = given
    inputs = _scan_inputs(tensors, softplus)
    y, final, starts = _scan_outputs(inputs["x"], inputs["a"], keep)
    (begin,) = contiguous(initial)
    call(SCAN_FORWARD, y.dtype, **inputs, initial=begin, y=y, final=final, starts=starts if keep else None)
    return y, final, starts


@selective_scan_cpu.register_fake
def _(x: Tensor, delta: Any, bias: Any, a: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _scan_outputs(x, a, keep=rest[-1])


@torch.library.custom_op(
    "espalier::selective_scan_backward",
    mutates_args=(),
    schema=f"({_SCAN}, Tensor starts, Tensor dy, Tensor? df, bool softplus) -> ({', '.join(['Tensor'] * 9)})",
)
def selective_scan_backward_cpu(*given: Any) -> tuple[Tensor, ...]:
    """Return the gradients of (x, delta, bias, a, b, c, d, gate, initial state); that of no gate is empty."""
    *tensors, starts, dy, df, softplus = given
    inputs, (dy, df) = _scan_inputs(tensors, softplus), contiguous(dy, df)
    x, gate, states, groups = inputs["x"], inputs["gate"], inputs["states"], inputs["groups"]
    batch, length, channels = x.shape
    dx, ddelta, dgate = torch.empty_like(x), torch.empty_like(x), x.new_empty(0 if gate is None else x.shape)
    da, dinitial = x.new_empty(batch, channels, states), x.new_empty(batch, channels, states)
    db, dc = (x.new_empty(batch, groups, length, states) for _ in range(2))
    dd, dbias = (x.new_empty(batch, channels) for _ in range(2))
    outputs = {"dx": dx, "ddelta": ddelta, "dbias": dbias, "da": da, "db": db, "dc": dc, "dd": dd}
    rest = {"dy": dy, "dfinal": df, "dgate": None if gate is None else dgate, "dinitial": dinitial}
    call(SCAN_BACKWARD, x.dtype, **inputs, starts=starts, **outputs, **rest)
    return dx, ddelta, dbias.sum(0), da.sum(0), db.sum(1), dc.sum(1), dd.sum(0), dgate, dinitial


@selective_scan_backward_cpu.register_fake
def _(x: Tensor, delta: Tensor, bias: Any, a: Tensor, b: Tensor, c: Tensor, d: Any, gate: Any, *_: Any) -> Any:
    dx, ddelta, da, db, dc = (t.new_empty(t.shape) for t in (x, delta, a, b, c))
    dbias, dd = (x.new_empty(x.shape[2]) for _ in range(2))
    dgate, dinitial = x.new_empty(0 if gate is None else x.shape), x.new_empty(x.shape[0], *a.shape)
    return dx, ddelta, dbias, da, db, dc, dd, dgate, dinitial


register_gradients(
    selective_scan_cpu,
    lambda given, starts, grads, numbers: selective_scan_backward_cpu(*given[:8], *starts, *grads[:2], numbers[0]),
    formulas.gated_scan,
    tensors=9,
    kept=1,
)


def _conv_inputs(x_BLC: Tensor, weight: Tensor, bias: Tensor | None) -> dict[str, Any]:
    """Return what both passes need by the kernel's names."""
    x_BLC, (weight, bias) = rows(x_BLC), contiguous(weight, bias)
    (batch, length, channels), taps = x_BLC.shape, weight.shape[1]
    sizes = {"batch": batch, "length": length, "channels": channels, "taps": taps, "stride": x_BLC.stride(1)}
    return {"x": x_BLC, "weight": weight, "bias": bias, **sizes}


@torch.library.custom_op("espalier::causal_conv_silu", mutates_args=())
def causal_conv_silu_cpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return SiLU of the causal depthwise convolution of x (B, L, C) with ``weight`` (C, K), the newest tap last."""
    y = x.new_empty(x.shape)
    call(CONV_FORWARD, x.dtype, y=y, **_conv_inputs(x, weight, bias))
    return y


@causal_conv_silu_cpu.register_fake
def _(x: Tensor, weight: Tensor, bias: Any) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("espalier::causal_conv_silu_backward", mutates_args=())
def causal_conv_silu_backward_cpu(
    x: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of (x, weight, bias)."""
    batch, _, channels = x.shape
    dx = x.new_empty(x.shape)
    dweight, dbias = x.new_empty(batch, channels, weight.shape[1]), x.new_empty(batch, channels)
    outputs = {"dx": dx, "dweight": dweight, "dbias": dbias}
    call(CONV_BACKWARD, x.dtype, dy=dy.contiguous(), **outputs, **_conv_inputs(x, weight, bias))
    return dx, dweight.sum(0), dbias.sum(0)


@causal_conv_silu_backward_cpu.register_fake
def _(x: Tensor, weight: Tensor, bias: Any, dy: Any) -> Any:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), x.new_empty(x.shape[2])


register_gradients(
    causal_conv_silu_cpu,
    lambda given, _, grads, numbers: causal_conv_silu_backward_cpu(*given, *grads),
    formulas.causal_conv_silu,
    tensors=3,
)
