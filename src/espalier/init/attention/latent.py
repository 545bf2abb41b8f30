"""Mimetic initialisation of multi-head latent attention: both products near multiples of I, as far as latents let."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from espalier.contents import without_numbers
from espalier.init.attention.mimetic import Strength, check_choices, spread_factors, write_rows
from espalier.init.attention.near_identity import (
    compute_device,
    compute_type,
    full_precision,
    near_identity_corner,
    random_frame,
    signed_qr,
    split,
)
from espalier.init.layouts.registry import LatentAttentionWeights, latent_map
from espalier.randomness import cpu_generator

# A direction of a latent that is this much weaker than the strongest is lost: no weight after it could make up for it.
_WEAKEST = 1e-4


@torch.no_grad()
@full_precision()
def mimetic_latent_attention_(
    weights: LatentAttentionWeights,
    *,
    qk: Strength | None = (0.7, 0.7),
    vo: Strength | None = (0.4, -0.4),
    noise: str = "normal",
    generator: torch.Generator | None = None,
) -> None:
    """Write mimetic structure into one layer of multi-head latent attention, in place.

    A latent of r features lets r of the d directions of a token through. Its map is G (``latent_map``: the norm's gain
    and mean rescaling are in it) and P projects on its rows' space. Per head, of the rows without positions,

        ``W_Q,h W_K,hᵀ = G_qᵀ B_Q,hᵀ B_K,h G_kv``  is the best approximation of rank n of  ``P_q (α₁Z + β₁I) P_kv``,

    and over all heads ``Σ_h W_V,h W_O,h = G_kvᵀ B_Vᵀ Oᵀ`` is that of rank min(H·m, r) of ``P_kv (α₂Z + β₂I)``.

    The query latent is written so that its space holds the other's, or lies in it: of independent ones only about
    r r_q/d directions meet. The key-value latent becomes orthonormal where both products are asked for; where one is,
    it is kept, since keys and values both come out of it. Norms, biases and rows that carry positions are left alone.

    Args:
        weights: the layer's views.
        qk: (α₁, β₁), or ``None`` to leave queries and keys alone.
        vo: (α₂, β₂), or ``None`` to leave values and outputs alone.
        noise: distribution of Z.
        generator: source of Z and of the latents' spaces.

    Raises:
        ArithmeticError: a latent that is kept has lost directions (a zero row, a gain of zero).
        EspalierError: strengths that are no two finite numbers, or an unknown noise.

    Source: arXiv 2305.09828, section 3, for the products; the treatment of latents (arXiv 2405.04434) is ours.
    """
    check_choices(qk, vo, noise, "auto")
    if without_numbers(weights.q) or (qk is None and vo is None):
        return
    dim, device = len(weights.out), weights.out.device
    options: dict[str, Any] = {"noise": noise, "generator": cpu_generator(generator), "device": device}
    if qk is not None and vo is not None:
        frame_DR = random_frame(dim, len(weights.kv_down), generator=options["generator"], device=device)
        weights.kv_down.copy_(frame_DR.mT)
    latent = _space(weights.kv_down, weights.kv_gain, weights.scales[1], dim)
    if qk is not None:
        _write_queries_and_keys(weights, *latent, qk, options)
    if vo is not None:
        _write_values_and_output(weights, *latent, vo, options)


def _write_queries_and_keys(
    weights: LatentAttentionWeights, kv_DR: Tensor, kv_RR: Tensor, strength: Strength, options: Mapping[str, Any]
) -> None:
    dim, rank_kv = kv_DR.shape
    overlap_SR, q_SS = kv_DR, None
    if weights.q_down is not None and weights.q_gain is not None:
        rank_q, frame = len(weights.q_down), kv_DR
        if rank_q > rank_kv:
            extra = random_frame(dim, rank_q - rank_kv, generator=options["generator"], device=options["device"])
            frame = signed_qr(torch.cat([kv_DR, extra], 1))[0]
        weights.q_down.copy_(frame[:, :rank_q].mT)
        q_DS, q_SS = _space(weights.q_down, weights.q_gain, weights.scales[0], dim)
        overlap_SR = q_DS.mT @ kv_DR
    alpha, beta = strength
    rows, columns = overlap_SR.shape
    for q_NS, k_NR in zip(weights.q, weights.k, strict=True):
        # In the latents' coordinates the target is a small matrix: Q_qᵀ (αZ + βI) Q_kv.
        target_SR = near_identity_corner(rows, columns, dim, alpha, 0.0, **options).add_(overlap_SR, alpha=beta)
        left, right = split(target_SR, min(len(k_NR), rows, columns))
        write_rows(q_NS, left if q_SS is None else _behind(q_SS, left))
        write_rows(k_NR, _behind(kv_RR, right))


def _write_values_and_output(
    weights: LatentAttentionWeights, kv_DR: Tensor, kv_RR: Tensor, strength: Strength, options: Mapping[str, Any]
) -> None:
    heads, width, _ = weights.v.shape
    dim, rank = kv_DR.shape
    inner, (alpha, beta) = heads * width, strength
    target_RD = near_identity_corner(rank, dim, dim, alpha, 0.0, **options).add_(kv_DR.mT, alpha=beta)
    left, right = spread_factors(split(target_RD, min(inner, rank)), inner, options)
    weights.v.copy_(_behind(kv_RR, left).mT.unflatten(0, (heads, width)))
    weights.out.copy_(right)


def _space(down: Tensor, gain: Tensor, scale: float, dim: int) -> tuple[Tensor, Tensor]:
    """Return Q (d, r) with orthonormal columns and triangular T with ``G = Tᵀ Qᵀ``, as of width d's factors."""
    map_RD = latent_map(down, gain, scale).to(compute_device(dim, down.device), compute_type(dim))
    q_DR, t_RR = signed_qr(map_RD.mT)
    sizes = t_RR.diagonal().abs()
    if not float(sizes.min()) > _WEAKEST * float(sizes.max()):
        raise ArithmeticError("its latent has lost directions (a zero row or gain): draw it again, then write")
    return q_DR, t_RR


def _behind(t_RR: Tensor, factor_RK: Tensor) -> Tensor:
    """Return the weights behind a latent, transposed: Bᵀ of ``B G = factorᵀ Qᵀ``, so ``T Bᵀ = factor``."""
    return torch.linalg.solve_triangular(t_RR, factor_RK, upper=True)
