"""Attention written in many ways, with its products as its own forward pass shows them: what must not be misread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

DIM = 24
# Maps in each storage: separate ones, or fused rows as (which, how they are laid out).
STORAGE = ("separate", "blocks", "by_head", "shuffled_blocks", "shuffled_heads", "rolled", "kv_blocks", "kv_by_head")
# What a layer does with rotary angles that it can do without: nothing, or it wants them in a form of its own.
ANGLES = ("ignored", "function", "logarithm")
KEYS = ("self", "context", "channels", "pooled", "shifted", "learned")


@dataclass(frozen=True)
class Form:
    """How a ``RandomAttention`` stores its rows and what it does with them."""

    storage: str = "blocks"
    heads: int = 4
    groups: int = 4
    keys: str = "self"
    causal: bool = False
    norm: str = ""
    rotary: bool = False
    gate: bool = False
    order: int = 0
    tiled: bool = False
    swapped_heads: bool = False
    bias: bool = False
    fused: bool = False
    angles: str = "ignored"


class RandomAttention(nn.Module):
    """Attention of a given form; ``scores`` keeps the last logits before masks, unscaled."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form, self.num_heads, self.head_dim = form, form.heads, DIM // form.heads
        self.num_kv_heads = form.groups
        small = self.head_dim * form.groups
        if form.storage == "separate":
            self.q_proj, self.k_proj = nn.Linear(DIM, DIM, form.bias), nn.Linear(DIM, small, form.bias)
            self.v_proj = nn.Linear(DIM, small, form.bias)
        elif form.storage.startswith("kv"):
            self.to_q, self.to_kv = nn.Linear(DIM, DIM, form.bias), nn.Linear(DIM, 2 * small, form.bias)
        else:
            self.qkv = nn.Linear(DIM, DIM + 2 * small, form.bias)
        self.proj = nn.Linear(DIM, DIM, form.bias)
        if form.norm:
            self.q_norm = nn.LayerNorm(self.head_dim) if form.norm == "layer" else nn.RMSNorm(self.head_dim)
            self.k_norm = nn.LayerNorm(self.head_dim) if form.norm == "layer" else nn.RMSNorm(self.head_dim)
        if form.gate:
            self.gate = nn.Linear(DIM, DIM)
        if form.keys == "learned":
            self.tokens = nn.Parameter(torch.randn(5, DIM))
        self.scores: Tensor | None = None

    def rows(self, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, L, H, K) of x, keys and values (B, L, G, K) of another sequence."""
        form, k = self.form, self.head_dim
        small = k * form.groups
        if form.storage == "separate":
            q, key, value = self.q_proj(x), self.k_proj(other), self.v_proj(other)
        elif form.storage == "kv_blocks":
            q, (key, value) = self.to_q(x), self.to_kv(other).chunk(2, -1)
        elif form.storage == "kv_by_head":
            q = self.to_q(x)
            key, value = (p.flatten(-2) for p in self.to_kv(other).unflatten(-1, (form.groups, 2, k)).unbind(-2))
        else:
            own, theirs = self.qkv(x), self.qkv(other)
            if form.storage == "rolled":
                own, theirs = own.roll(k, -1), theirs.roll(k, -1)
            if form.storage in ("by_head", "shuffled_heads") and form.groups == form.heads:
                order = ((0, 1, 2), (2, 0, 1), (1, 0, 2))[form.order if form.storage == "shuffled_heads" else 0]
                split = [t.unflatten(-1, (form.heads, 3, k)) for t in (own, theirs, theirs)]
                q, key, value = (t[..., place, :].flatten(-2) for t, place in zip(split, order, strict=True))
            else:
                sizes = [DIM, small, small]
                order = ((0, 1, 2), (1, 2, 0), (2, 1, 0))[form.order if form.storage == "shuffled_blocks" else 0]
                stored = [sizes[order.index(place)] for place in range(3)]
                q, key, value = (
                    t.split(stored, -1)[place] for t, place in zip((own, theirs, theirs), order, strict=True)
                )
        return q.unflatten(-1, (-1, k)), key.unflatten(-1, (-1, k)), value.unflatten(-1, (-1, k))

    def forward(self, x: Tensor, context: Tensor | None = None, rope: Any = None) -> Tensor:
        """Return the layer's output for (B, L, d)."""
        form = self.form
        other = x if context is None else context
        if form.keys == "pooled":
            other = x[:, : x.shape[1] // 2 * 2].unflatten(1, (-1, 2)).mean(2) if x.shape[1] > 1 else x
        elif form.keys == "shifted":
            other = x.roll(1, 1)
        elif form.keys == "learned":
            other = torch.cat([self.tokens[: x.shape[1]].expand(len(x), -1, -1)] * -(-x.shape[1] // 5), 1)[
                :, : x.shape[1]
            ]
        q, k, v = (part.transpose(1, 2) for part in self.rows(x, other))
        if form.norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if form.rotary:
            q, k = _turn(q), _turn(k)
        if rope is not None and form.angles == "function":
            q, k = rope(q), rope(k)
        elif rope is not None and form.angles == "logarithm":
            q = q * rope[1].log()
        share = form.heads // form.groups
        k, v = (p.repeat(1, share, 1, 1) if form.tiled else p.repeat_interleave(share, 1) for p in (k, v))
        if form.keys == "channels":
            self.scores = q.mT @ k
            out = v @ (self.scores / 8).softmax(-1).mT
        else:
            self.scores = q @ k.mT
            logits = self.scores / self.head_dim**0.5
            if form.fused:
                with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
                    out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=form.causal)
            else:
                if form.causal:
                    logits = logits.masked_fill(torch.ones_like(logits[0, 0]).triu(1).bool(), float("-inf"))
                out = logits.softmax(-1) @ v
        if form.swapped_heads:
            out = out.flip(1)
        out = out.transpose(1, 2).flatten(2)
        return self.proj(out * self.gate(x).sigmoid() if form.gate else out)


def _turn(x: Tensor) -> Tensor:
    angle = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * 0.5
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


@torch.no_grad()
def true_diagonals(module: RandomAttention) -> tuple[float, float]:
    """Return the mean diagonals of W_Q W_Kᵀ (over heads) and W_V W_out that a float64 module's forward pass shows.

    Each pair of unit tokens is at distance zero from itself: S(i, i) of a sequence with one token e_i is the diagonal.
    """
    diagonal = 0.0
    products = torch.zeros(DIM, DIM, dtype=torch.float64)
    for index, token in enumerate(torch.eye(DIM, dtype=torch.float64)):
        products[index] = module(token[None, None])[0, 0]
        assert module.scores is not None
        diagonal += float(module.scores.mean()) / DIM
    return diagonal, float(products.diagonal().mean())
