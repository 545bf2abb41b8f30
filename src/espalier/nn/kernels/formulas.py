"""What the hand-written operators compute, in torch's own operations, and gradients by them.

A backward pass by hand ends at the gradients: it cannot be differentiated again, and nobody derived it forward. Where
that is asked for, the formulas here run in its place, slowly and right: a loop over time, everything kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from espalier.nn.precision import is_batched, is_transformed


def by_formula() -> bool:
    """Return whether gradients must come from formulas: they are differentiated, or stand for many at once."""
    return torch.is_grad_enabled() or is_batched() or is_transformed()


def differentiate(
    formula: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    gradients: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Return the gradients of the inputs from those of a formula's outputs; differentiable in turn if grad mode is on.

    Args:
        formula: takes the inputs and returns the outputs; None for one without a gradient.
        inputs: as the operator was given them, so that gradients lead on through them; None for one that is missing.
        gradients: of the outputs; None for one that nobody used. What comes behind the formula's outputs has none.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Each is a tensor of its own, also where one was given twice. ``torch.func.vmap`` refuses ``requires_grad_``.
        given = [None if t is None else t.view_as(t) for t in inputs]
        made = formula(*given)
        outputs = [made] if isinstance(made, Tensor) else list(made)
        known = [(o, g) for o, g in zip(outputs, gradients, strict=False) if o is not None and g is not None]
        pairs = [(o, g) for o, g in known if o.requires_grad]
        wanted = [t for t in given if t is not None and t.requires_grad]
        found = iter(
            torch.autograd.grad(
                [o for o, _ in pairs], wanted, [g for _, g in pairs], create_graph=again, allow_unused=True
            )
            if pairs and wanted
            else [None] * len(wanted)
        )
        return [next(found) if t is not None and t.requires_grad else None for t in given]


def silu(x: Tensor) -> Tensor:
    """Return x · sigmoid(x); the gradient of torch's own ``silu`` has no forward derivative."""
    return x * torch.sigmoid(x)


def causal_conv_silu(x_BLC: Tensor, weight_CK: Tensor, bias_C: Tensor | None) -> Tensor:
    """Return ``SiLU(bias + Σ_k weight[:, k] · x_{t−K+1+k})``."""
    y = F.conv1d(F.pad(x_BLC.mT, (weight_CK.shape[1] - 1, 0)), weight_CK[:, None], bias_C, groups=weight_CK.shape[0])
    return silu(y).mT


def gated_norm(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """Return ``weight · v / √(mean(v²) + eps)``, v = y · SiLU(z), the mean over each group of the last dimension."""
    gated = (silu(z) * y).unflatten(-1, (groups, -1))
    return (gated * (gated.square().mean(-1, keepdim=True) + eps).rsqrt()).flatten(-2) * weight


def selective_scan(
    x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return (y, final state) of ``h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t x_t``, ``y_t = C_t h_t``."""
    decays = torch.exp(delta[..., None] * a)
    inputs = (delta * x)[..., None] * b[:, :, None]
    state, states = initial, []
    for decay, step in zip(decays.unbind(1), inputs.unbind(1), strict=True):
        state = step if state is None else decay * state + step
        states.append(state)
    assert state is not None
    return (torch.stack(states, 1) * c[:, :, None]).sum(-1), state


def gated_scan(
    x: Tensor, delta: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None,
    gate: Tensor | None, initial: Tensor | None, softplus: bool, *_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (y, final state) of ``espalier.nn.selective_scan``, with Δ = softplus(delta + bias) if so asked."""
    if softplus:
        delta = F.softplus(delta if bias is None else delta + bias)
    y, final = selective_scan(x, delta, a, b, c, initial)
    y = y if d is None else y + d * x
    return (y if gate is None else y * silu(gate)), final


def ssd(
    x_BLHP: Tensor, delta_BLH: Tensor, alpha_BLH: Tensor, b_BLHN: Tensor, c_BLHN: Tensor, initial_BHNP: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return (y, final state) of ``S_t = exp(α_t) S_{t−1} + Δ_t B_t x_tᵀ``, ``y_t = S_tᵀ C_t``, B and C per head."""
    decays = alpha_BLH.exp()[..., None, None]
    inputs = b_BLHN[..., None] * (delta_BLH[..., None] * x_BLHP)[..., None, :]
    state, results = initial_BHNP, []
    for decay, step, read in zip(decays.unbind(1), inputs.unbind(1), c_BLHN.unbind(1), strict=True):
        state = step if state is None else decay * state + step
        results.append((read[..., None] * state).sum(-2))
    assert state is not None
    return torch.stack(results, 1), state


def grouped_ssd(
    x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return (y, final state) of ``espalier.nn.ssd``: heads of a group share B and C, and D x is added."""
    share = x.shape[2] // b.shape[2]
    y, final = ssd(x, delta, delta * a, b.repeat_interleave(share, 2), c.repeat_interleave(share, 2), initial)
    return (y if d is None else y + d[:, None] * x), final


def ssd_of_one_group(
    x: Tensor, delta: Tensor, alpha: Tensor, b: Tensor, c: Tensor, d_BH: Tensor | None, initial_BNHP: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return (y, final state (B, N, H, P)) where all heads share B and C, with D x added."""
    b, c = (t[:, :, None].expand(-1, -1, x.shape[2], -1) for t in (b, c))
    y, final = ssd(x, delta, alpha, b, c, None if initial_BNHP is None else initial_BNHP.transpose(1, 2))
    return (y if d_BH is None else y + d_BH[:, None, :, None] * x), final.transpose(1, 2)


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int, int, int]) -> Tensor:
    """Return the depthwise convolution in a frame of zeros (rows above and below, columns left and right)."""
    top, bottom, left, right = padding
    wide = F.pad(x.to(weight.dtype), (left, right, top, bottom))
    return F.conv2d(wide, weight, bias, groups=len(weight)).to(x.dtype)


def gelu_norm(
    u: Tensor, bias: Tensor | None, weight: Tensor, shift: Tensor, mean: Tensor, variance: Tensor, eps: float,
    fixed: bool,
) -> Tensor:  # fmt: skip
    """Return ``γ · (g − μ)/√(σ² + ε) + β``, g = GELU(u + bias), with these statistics if ``fixed``, else g's own."""
    wide = u.to(weight.dtype)
    active = F.gelu(wide if bias is None else wide + bias.view(-1, 1, 1))
    if not fixed:
        mean, variance = active.mean((0, 2, 3)), active.var((0, 2, 3), correction=0)
    scale = weight * (variance + eps).rsqrt()
    return (active * scale.view(-1, 1, 1) + (shift - mean * scale).view(-1, 1, 1)).to(u.dtype)
