"""The mixing matrix of a state-space layer: what attention's map is to attention."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from espalier.errors import EspalierError
from espalier.nn.precision import no_autocast, upcast, widened
from espalier.nn.ssm.mamba import Mamba1, Mamba2, conv_silu, step_sizes


class Recurrence(NamedTuple):
    """What a mixer hands to its recurrence: arguments of ``ssd`` (Mamba-2) or ``selective_scan`` (Mamba-1)."""

    values: Tensor
    delta: Tensor
    a: Tensor
    b: Tensor
    c: Tensor


@torch.no_grad()
def recurrence_of(mixer: Mamba1 | Mamba2, x_BLD: Tensor) -> Recurrence:
    """Return the values, Δ, A, B and C of one input, in float32 or float64, without the skip D and the gate z.

    Raises:
        EspalierError: another module, or an input of another shape.
    """
    if not isinstance(mixer, Mamba1 | Mamba2):
        raise EspalierError(f"mixer is a {type(mixer).__name__}: give a Mamba1 or a Mamba2")
    if x_BLD.ndim != 3 or x_BLD.shape[2] != mixer.dim or not x_BLD.shape[1]:
        raise EspalierError(f"x has shape {tuple(x_BLD.shape)}: give (batch, length, {mixer.dim})")
    inner, *others = mixer._project(x_BLD)
    values = conv_silu(mixer.conv1d, inner, None)
    if isinstance(mixer, Mamba1):
        delta, b, c = mixer.coefficients(values)
    else:
        values, b, c = mixer._maps(values)
        delta = step_sizes(others[1], mixer.dt_bias)
    values, delta, log_rates, b, c = upcast(values, delta, mixer.A_log, b, c)
    return Recurrence(values, delta, -log_rates.exp(), b, c)


@torch.no_grad()
def mixing_matrix(mixer: Mamba1 | Mamba2, x_BLD: Tensor) -> Tensor:
    """Return the matrices by which a mixer's recurrence acts on its values for one input: lower triangular, real.

    ``M[t, s] = Σ_n C_t,n · exp(A_n Σ_{s<r≤t} Δ_r) · Δ_s · B_s,n`` for s ≤ t, so that ``M @ values`` is the output of
    the recurrence without the skip D and before the gate; the values are what the short convolution gives. Without
    decay and with Δ = 1 it is causal linear attention, ``C Bᵀ`` under the causal mask.

    Args:
        mixer: a ``Mamba1`` or ``Mamba2``; load a library's ``state_dict`` into one to look at that library's layer.
        x_BLD: the mixer's input.

    Returns:
        M, in float32 or float64: (B, H, L, L), one a head, for Mamba-2; (B, E, L, L), one a channel, for Mamba-1.

    Raises:
        EspalierError: another module, or an input of another shape.

    Source: arXiv 2405.21060, section 3 (the matrix form of both recurrences).
    """
    _, delta, a, b, c = recurrence_of(mixer, x_BLD)
    a = a.clamp_min(torch.finfo(a.dtype).min)  # over no step even a rate of -∞ decays by nothing
    # Wide: of the differences of plain sums, after one long step, only rounding is left.
    steps_BLH = widened(delta).cumsum(1)
    # Above the diagonal the spans are negative and their exponentials could overflow; there the result is 0.
    spans_BHLL = (steps_BLH[:, :, None] - steps_BLH[:, None]).movedim(3, 1).clamp_min(0).to(delta.dtype)
    inputs_BH1L = delta.mT[:, :, None]
    if isinstance(mixer, Mamba2):
        with no_autocast(c.device):
            scores_BGLL = c.transpose(1, 2) @ b.permute(0, 2, 3, 1)
        scores_BHLL = scores_BGLL.repeat_interleave(spans_BHLL.shape[1] // scores_BGLL.shape[1], 1)
        return (scores_BHLL * (a[:, None, None] * spans_BHLL).exp() * inputs_BH1L).tril()
    mixing_BELL = torch.zeros_like(spans_BHLL)
    for state in range(a.shape[1]):  # one state at a time: all at once would be N times the result
        scores_BLL = c[:, :, None, state] * b[:, None, :, state]
        mixing_BELL += scores_BLL[:, None] * (a[:, state, None, None] * spans_BHLL).exp()
    return (mixing_BELL * inputs_BH1L).tril()
