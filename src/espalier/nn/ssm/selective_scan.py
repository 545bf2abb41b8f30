"""The Mamba-1 recurrence: by a kernel where there is one, else pieces of time in plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from espalier.errors import EspalierError
from espalier.nn.kernels import formulas
from espalier.nn.kernels.backend import choose
from espalier.nn.precision import is_tracing, outside_graphs, upcast, without_autocast
from espalier.nn.ssm.optional_inputs import at_real_tokens, check_devices, check_shapes

# Note [Pieces of time in torch]
# All B·L·E·N states at once fill the memory and miss every cache; one step at a time makes a dozen small calls a step.
# Exponentials and products are done for a piece of T steps at once, in a buffer about the size of the cache; only the
# recurrence itself goes step by step, one fused multiply-add each. The backward pass recomputes a piece from the state
# at its start.
_PIECE_NUMBERS = 1 << 20


def selective_scan(
    x_BLE: Tensor,
    delta_BLE: Tensor,
    a_EN: Tensor,
    b_BLN: Tensor,
    c_BLN: Tensor,
    d_E: Tensor | None = None,
    *,
    delta_bias_E: Tensor | None = None,
    delta_softplus: bool = False,
    gate_BLE: Tensor | None = None,
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the Mamba-1 recurrence ``h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t x_t``, ``y_t = C_t h_t + D x_t`` per channel.

    States and decays are float32 (float64 for float64 input) whatever autocast says; ``backend()`` says what runs.

    Args:
        x_BLE: inputs, (batch, length, channels).
        delta_BLE: step sizes Δ ≥ 0, or what gives them.
        a_EN: decay rates A ≤ 0, (channels, state size).
        b_BLN: input maps, shared by the channels.
        c_BLN: output maps.
        d_E: skip weights.
        delta_bias_E: added to ``delta_BLE``.
        delta_softplus: Δ = softplus(delta + bias).
        gate_BLE: z; y is multiplied by SiLU(z).
        initial_state: state before the first token, (B, E, N); zero if none is given.
        mask: (B, L), true at real tokens; others leave the state as it is and give 0.
        return_state: also return the state after the last token.

    Returns:
        y of the shape and dtype of ``x_BLE``, and with ``return_state`` the state (B, E, N).

    Raises:
        EspalierError: an empty x, or shapes that do not fit together.

    Source: arXiv 2312.00752, section 3.
    """
    _check(x_BLE, delta_BLE, a_EN, b_BLN, c_BLN, "B, L", gate_BLE)
    (batch, length, channels), dtype = x_BLE.shape, x_BLE.dtype
    of_channels = {"d": (d_E, (channels,)), "delta_bias": (delta_bias_E, (channels,))}
    check_shapes(**of_channels, initial_state=(initial_state, (batch, *a_EN.shape)), mask=(mask, (batch, length)))
    given = (x_BLE, delta_BLE, delta_bias_E, a_EN, b_BLN, c_BLN, d_E, gate_BLE, initial_state)
    x, delta, bias, a, b, c, d, gate, start = upcast(*given)
    check_devices(x, delta, bias, a, b, c, d, gate, start)
    if mask is not None:
        x, delta, b, c, gate = at_real_tokens(mask, x, delta, b, c, gate)
    name = choose("selective_scan", x.device.type)
    in_kernel = name == "compiled" and mask is None and delta_softplus
    if not in_kernel:
        delta, bias = delta if bias is None else delta + bias, None
        delta = F.softplus(delta) if delta_softplus else delta
        delta = delta if mask is None else at_real_tokens(mask, delta)[0]
    y, final = _run(name, (x, delta, bias, a, b, c, d, gate, start), softplus=in_kernel)
    y = (y if mask is None else at_real_tokens(mask, y)[0]).to(dtype)
    return (y, final) if return_state else y


def _run(name: str, tensors: tuple[Any, ...], *, softplus: bool) -> tuple[Tensor, Tensor]:
    """Return (gated y, final state); only the compiled kernel takes a bias and a softplus."""
    if name == "formula":
        return formulas.gated_scan(*tensors, softplus)
    if name == "compiled":
        from espalier.nn.kernels.cpu import needs_grad, selective_scan_cpu

        y, final, _ = selective_scan_cpu(*tensors, softplus, needs_grad(*tensors))
        return y, final
    x, delta, _, a, b, c, d, gate, state = tensors
    if name == "mamba_ssm" and state is None and x.dtype == torch.float32:  # its kernel starts from zero only
        from espalier.nn.kernels.cuda import selective_scan_mamba_ssm

        y, final = selective_scan_mamba_ssm(x, delta, a, b, c, d)
    else:
        y, final = _apply(name, x, delta, a, b, c, state)
        y = y if d is None else y + d * x
    return (y if gate is None else y * F.silu(gate)), final


def selective_step(
    x_BE: Tensor, delta_BE: Tensor, a_EN: Tensor, b_BN: Tensor, c_BN: Tensor, d_E: Tensor | None, state_BEN: Tensor
) -> tuple[Tensor, Tensor]:
    """Advance the Mamba-1 recurrence of ``selective_scan`` by one token and return (y_BE, the new state).

    Raises:
        EspalierError: shapes or devices that do not fit together: a state of one sequence would be broadcast.
    """
    _check(x_BE, delta_BE, a_EN, b_BN, c_BN, "B")
    check_shapes(d=(d_E, a_EN.shape[:1]), state=(state_BEN, (len(x_BE), *a_EN.shape)))
    x, delta, a, b, c, d, before = upcast(x_BE, delta_BE, a_EN, b_BN, c_BN, d_E, state_BEN)
    check_devices(x, delta, a, b, c, d, before)
    decay_BEN = torch.exp(delta[..., None] * a)
    state = decay_BEN * before + (delta * x)[..., None] * b[:, None]
    y = (state * c[:, None]).sum(-1)
    if d is not None:
        y = y + d * x
    return y.to(x_BE.dtype), state


def _check(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, axes: str, gate: Tensor | None = None) -> None:
    """Refuse shapes that do not fit together; ``axes`` are those of sequences, "B, L", or of one token each, "B"."""
    if x.ndim != len(axes.split()) + 1 or delta.shape != x.shape or a.ndim != 2 or a.shape[0] != x.shape[-1]:
        shapes = f"x is {tuple(x.shape)}, delta {tuple(delta.shape)}, a {tuple(a.shape)}"
        raise EspalierError(f"{shapes}: give ({axes}, E), ({axes}, E), (E, N)")
    wanted = (*x.shape[:-1], a.shape[1])
    if b.shape != c.shape or b.shape != wanted:
        raise EspalierError(f"b is {tuple(b.shape)} and c {tuple(c.shape)}: give both as ({axes}, N) = {wanted}")
    if gate is not None and gate.shape != x.shape:
        raise EspalierError(f"gate is {tuple(gate.shape)}: give it the shape of x, {tuple(x.shape)}")
    if axes == "B, L" and not x.numel():  # no kernel takes it; a step of no sequences is one
        raise EspalierError(f"x is empty, {tuple(x.shape)}: give at least one sequence of at least one token")
    if not a.shape[1]:
        raise EspalierError(f"a is {tuple(a.shape)}: give at least one state a channel")


def _advance(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return decays and states of one piece, (T, B, E, N), from inputs with time first."""
    decays = (delta[..., None] * a).exp_()
    states = (delta * x)[..., None] * b[:, :, None]
    steps = states.unbind(0)
    for decay, step in zip(decays.unbind(0), steps, strict=True):
        state = step.addcmul_(decay, state)
    return decays, states


def _time_first(tensors: tuple[Tensor, ...], start: int, steps: int) -> list[Tensor]:
    return [tensor[:, start : start + steps].transpose(0, 1).contiguous() for tensor in tensors]


class _Pieces(torch.autograd.Function):
    """The recurrence piece by piece; see Note [Pieces of time in torch]."""

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any, x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, initial: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        batch, length, _ = x.shape
        steps = max(1, min(length, _PIECE_NUMBERS // (batch * a.numel())))
        state = x.new_zeros(batch, *a.shape) if initial is None else initial
        y, starts = torch.empty_like(x, memory_format=torch.contiguous_format), []
        for start in range(0, length, steps):
            starts.append(state)
            x_t, delta_t, b_t, c_t = _time_first((x, delta, b, c), start, steps)
            _, states = _advance(x_t, delta_t, a, b_t, state)
            y[:, start : start + steps] = (states @ c_t[..., None]).squeeze(-1).transpose(0, 1)
            state = states[-1].clone()
        ctx.save_for_backward(x, delta, a, b, c, initial, *starts)
        ctx.steps = steps
        return y, state

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        x, delta, a, b, c, initial, *starts = ctx.saved_tensors
        if formulas.by_formula():
            inputs = x, delta, a, b, c, initial
            return tuple(formulas.differentiate(formulas.selective_scan, inputs, (dy, dfinal)))
        dx, ddelta, db, dc = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, delta, b, c))
        da, carry = torch.zeros_like(a), dfinal
        for index in reversed(range(len(starts))):
            span = slice(index * ctx.steps, (index + 1) * ctx.steps)
            x_t, delta_t, b_t, c_t, dy_t = _time_first((x, delta, b, c, dy), span.start, ctx.steps)
            decays, states = _advance(x_t, delta_t, a, b_t, starts[index])
            grads = dy_t[..., None] * c_t[:, :, None]
            for decay, grad in zip(reversed(decays.unbind(0)), reversed(grads.unbind(0)), strict=True):
                carry = decay * grad.add_(carry)
            dc[:, span] = (dy_t[:, :, None] @ states).squeeze(2).transpose(0, 1)
            db[:, span] = ((delta_t * x_t)[:, :, None] @ grads).squeeze(2).transpose(0, 1)
            through = (grads @ b_t[..., None]).squeeze(-1)
            dx[:, span] = (through * delta_t).transpose(0, 1)
            # ∂(Δ A) = g · decay · (the state before).
            dlog = decays.mul_(grads)
            dlog[1:] *= states[:-1]
            dlog[0] *= starts[index]
            da += torch.mul(dlog, delta_t[..., None], out=states).sum((0, 1))
            ddelta[:, span] = (through * x_t + dlog.mul_(a).sum(-1)).transpose(0, 1)
        return dx, ddelta, da, db, dc, None if initial is None else carry


def _recurrence(
    name: str, x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    # What traces operations, an export say, sees through those of torch alone. Triton comes with mamba_ssm.
    if name in ("mamba_ssm", "triton") and x.dtype == torch.float32 and not is_tracing():
        from espalier.nn.kernels.triton_scans import TritonScan

        in_triton: tuple[Tensor, Tensor] = TritonScan.apply(x, delta, a, b, c, state)
        return in_triton
    in_torch: tuple[Tensor, Tensor] = _Pieces.apply(x, delta, a, b, c, state)
    return in_torch


# Wrapped once, here: a compiler that meets the call cannot trace the wrapping.
_apply = outside_graphs(_recurrence)
