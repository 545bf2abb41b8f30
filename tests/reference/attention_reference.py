"""Mimetic attention written straight from the paper: full SVDs in float64, weights that act as x W."""

from __future__ import annotations

import torch
from torch import Tensor


def best_approximation(matrix: Tensor, rank: int) -> Tensor:
    """Return the best rank-k approximation, one triplet at a time."""
    u, s, vh = torch.linalg.svd(matrix.double())
    total = torch.zeros_like(matrix, dtype=torch.float64)
    for i in range(rank):
        total += s[i] * torch.outer(u[:, i], vh[i])
    return total


def head_products(q: Tensor, k: Tensor, num_heads: int) -> list[Tensor]:
    """Return W_Q W_Kᵀ of every head from torch-convention weights, by explicit slicing."""
    width = q.shape[0] // num_heads
    products = []
    for head in range(num_heads):
        rows = slice(head * width, (head + 1) * width)
        w_q, w_k = q[rows].double().T, k[rows].double().T  # d × k, act as x W
        products.append(w_q @ w_k.T)
    return products


def value_output_product(v: Tensor, out: Tensor) -> Tensor:
    """Return W_V W_proj, so that attention's linear path is x → x W_V W_proj."""
    return v.double().T @ out.double().T


def off_diagonal_std(matrix: Tensor) -> float:
    """Return the standard deviation of the entries off the diagonal."""
    mask = ~torch.eye(len(matrix), dtype=torch.bool)
    return float(matrix[mask].std())
