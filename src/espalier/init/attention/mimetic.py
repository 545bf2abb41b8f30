"""Mimetic initialisation of self-attention: W_Q W_Kᵀ near +I per head, W_V W_proj near −I per layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from espalier.contents import without_numbers
from espalier.errors import EspalierError, unknown_name
from espalier.init.attention.near_identity import (
    METHODS,
    NOISES,
    Method,
    full_precision,
    near_identity,
    near_identity_corner,
    near_identity_factors,
    near_identity_heads,
    random_frame,
    split,
)
from espalier.randomness import cpu_generator

Strength = tuple[float, float]
_PILOT = 192


@dataclass(frozen=True)
class Mimetic:
    """What to write into self-attention: the strengths (α, β) of ``αZ + βI`` for both products.

    Attributes:
        qk: strengths for W_Q W_Kᵀ, one draw a head; ``None`` leaves queries and keys alone.
        vo: strengths for W_V W_proj, one draw a layer; ``None`` leaves values and the output projection alone.
        noise: distribution of Z, ``"normal"`` or ``"uniform"``.
        method: how factors are found, ``"auto"``, ``"exact"`` or ``"fast"``.
        layers: pairs (qk, vo) from the first attention layer to the last, in place of the two above; a model of another
            depth takes strengths between them, at the same fraction of its depth. ``espalier.init.fit`` makes them.

    Raises:
        EspalierError: strengths that are no two finite numbers, or an unknown noise or method.

    Source: arXiv 2305.09828, section 3, for the default strengths.
    """

    qk: Strength | None = (0.7, 0.7)
    vo: Strength | None = (0.4, -0.4)
    noise: str = "normal"
    method: Method = "auto"
    layers: tuple[tuple[Strength, Strength], ...] | None = None

    def __post_init__(self) -> None:
        check_choices(self.qk, self.vo, self.noise, self.method)
        for index, pair in enumerate(self.layers or ()):
            if not (isinstance(pair, tuple | list) and len(pair) == 2 and all(map(_is_strength, pair))):
                raise EspalierError(
                    f"layers[{index}] is {pair!r}: give ((α, β), (α, β)) for queries-keys and values-out"
                )

    def at(self, index: int, count: int) -> Mimetic:
        """Return the strengths of layer ``index`` of ``count``, as a spec without ``layers``."""
        if not self.layers:
            return self
        place = index / max(count - 1, 1) * (len(self.layers) - 1)
        low, share = int(place), place % 1
        ends = torch.tensor(
            [self.layers[low], self.layers[min(low + 1, len(self.layers) - 1)]], dtype=torch.float64, device="cpu"
        )
        qk, vo = torch.lerp(ends[0], ends[1], share).tolist()
        return replace(self, qk=tuple(qk), vo=tuple(vo), layers=None)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Mimetic:
        """Return the preset ``name`` with ``changes`` laid over it.

        ``"vision"`` is the paper's setting. ``"language"`` (values and outputs only, weak) is our reading of how one
        public speed-run gained; it is a lead to compare, not a finding of the paper.

        Raises:
            EspalierError: no such preset, or changes that ``Mimetic`` refuses.
        """
        if name not in PRESETS:
            raise unknown_name("mimetic preset", name, PRESETS)
        return replace(PRESETS[name], **{key: as_tuples(value) for key, value in changes.items()})


def _is_strength(pair: object) -> bool:
    try:
        alpha, beta = map(float, pair)  # type: ignore[call-overload]
    except (TypeError, ValueError):
        return False
    return not isinstance(pair, str) and math.isfinite(alpha) and math.isfinite(beta)


def check_choices(qk: object, vo: object, noise: str, method: str) -> None:
    """Refuse strengths that are no two finite numbers, and an unknown noise or method, before anything is written."""
    for name, pair in (("qk", qk), ("vo", vo)):
        if pair is not None and not _is_strength(pair):
            raise EspalierError(f"{name} is {pair!r}: give two finite numbers (α, β), or None to leave it alone")
    for kind, value, known in (("noise", noise, NOISES), ("method", method, METHODS)):
        if value not in known:
            raise unknown_name(kind, value, known)


PRESETS: Mapping[str, Mimetic] = {
    "vision": Mimetic(),
    "language": Mimetic(qk=None, vo=(0.01, -0.05)),
}


def as_tuples(value: Any) -> Any:
    """Return lists that came from JSON as the tuples that fields hold."""
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


@torch.no_grad()
@full_precision()
def mimetic_attention_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    num_heads: int,
    *,
    num_kv_heads: int | None = None,
    qk: Strength | None = (0.7, 0.7),
    vo: Strength | None = (0.4, -0.4),
    noise: str = "normal",
    method: Method = "auto",
    generator: torch.Generator | None = None,
) -> None:
    """Write mimetic structure into one self-attention layer's projection weights, in place.

    Per head, ``W_Q W_Kᵀ`` is the best rank-k approximation of ``α₁Z + β₁I``; per layer, ``W_V W_proj`` is
    ``α₂Z + β₂I``, exactly when values have as many dimensions as the model. Weights act as ``y = x Wᵀ``, so W_Q of head
    h is ``q[h·k:(h+1)·k].T`` and W_proj is ``out.T``.

    With grouped queries a key head serves several query heads: the first has the best approximation of its target, the
    others the projection of theirs onto that key head. The group's output projections share the value head's part of
    the sum equally, so ``Σ_h W_V,g(h) W_O,h`` is the best approximation in the rank that is left. Rotary positions
    turn queries against keys, and QK-norm rescales both: there the product holds at distance zero, up to scale.

    Args:
        q: query weight, (H·k, d), or (H, k, d) where the rows of different heads are apart.
        k: key weight, (H_kv·k, d) or (H_kv, k, d).
        v: value weight, (H_kv·k, d) or (H_kv, k, d).
        out: output projection weight, (d, H·k).
        num_heads: H.
        num_kv_heads: H_kv; H when left out.
        qk: (α₁, β₁), or ``None`` to leave queries and keys alone.
        vo: (α₂, β₂), or ``None`` to leave values and outputs alone.
        noise: distribution of Z.
        method: how the factors are found, see ``near_identity_factors``.
        generator: source of Z.

    Raises:
        EspalierError: shapes that do not fit together, weights that are not floating-point, strengths that are no two
            finite numbers, or an unknown noise or method.

    Source: arXiv 2305.09828, section 3; the treatment of grouped queries is ours.
    """
    check_choices(qk, vo, noise, method)
    groups = num_heads if num_kv_heads is None else num_kv_heads
    _check_shapes(q.flatten(0, -2), k.flatten(0, -2), v.flatten(0, -2), out, num_heads, groups)
    if without_numbers(q) or q.numel() == 0:
        return
    q_HKD, k_GKD, v_GKD = (
        part if part.ndim == 3 else part.unflatten(0, (count, -1))
        for part, count in ((q, num_heads), (k, groups), (v, groups))
    )
    options: dict[str, Any] = {
        "noise": noise, "method": method, "generator": cpu_generator(generator), "device": q.device
    }  # fmt: skip
    if qk is not None:
        _write_queries_and_keys(q_HKD, k_GKD, qk, options)
    if vo is not None:
        _write_values_and_output(v_GKD, out, num_heads, vo, options)


def _write_queries_and_keys(q_HKD: Tensor, k_GKD: Tensor, strength: Strength, options: Mapping[str, Any]) -> None:
    # One head at a time: a wide model's d × d target is the only large thing ever held.
    _, width, dim = q_HKD.shape
    groups, rank, shared = len(k_GKD), min(width, dim), len(q_HKD) // len(k_GKD)
    noise_options = {key: options[key] for key in ("noise", "generator")}
    for group, (left, right) in enumerate(near_identity_heads(groups, dim, rank, *strength, **options)):
        write_rows(k_GKD[group], right)
        for member in range(shared):
            if member:
                target = near_identity(dim, *strength, **noise_options).to(right)
                # right = V S^½, so V S^-½ is its pseudo-inverse transposed: left rightᵀ = target V Vᵀ.
                left = target @ (right / right.square().sum(0))
            write_rows(q_HKD[group * shared + member], left)


def write_rows(rows_KD: Tensor, factor_DR: Tensor) -> None:
    """Write a factor's columns as rows; a head that is wider than the rank has rows beyond it, which become zero."""
    rows_KD.zero_()
    rows_KD[: factor_DR.shape[1]].copy_(factor_DR.mT)


def spread_factors(factors: tuple[Tensor, Tensor], inner: int, options: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Spread both factors of a product over more value dimensions than its rank, by W with W Wᵀ = I."""
    left, right = factors
    if inner <= left.shape[1]:
        return left, right
    frame = random_frame(inner, left.shape[1], generator=options["generator"], device=options["device"]).to(left)
    return left @ frame.mT, right @ frame.mT


def _write_values_and_output(
    v_GKD: Tensor, out: Tensor, num_heads: int, strength: Strength, options: Mapping[str, Any]
) -> None:
    groups, width, dim = v_GKD.shape
    inner = groups * width
    left, right = spread_factors(near_identity_factors(dim, min(inner, dim), *strength, **options), inner, options)
    v_GKD.copy_(left.mT.unflatten(0, (groups, width)))
    shared = num_heads // groups
    parts = right.reshape(dim, groups, 1, width).expand(dim, groups, shared, width) / shared
    out.copy_(parts.reshape(dim, num_heads * width))


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, out: Tensor, num_heads: int, groups: int) -> None:
    if num_heads < 1 or q.shape[0] % num_heads:
        raise EspalierError(f"num_heads {num_heads} does not divide the query width {q.shape[0]}: choose a divisor")
    if groups < 1 or num_heads % groups:
        raise EspalierError(f"num_kv_heads {groups} does not divide num_heads {num_heads}: choose a divisor")
    if not all(weight.is_floating_point() for weight in (q, k, v, out)):
        raise EspalierError(f"the weights are {q.dtype}, {k.dtype}, {v.dtype}, {out.dtype}: pass floating-point ones")
    dim, width = q.shape[1], q.shape[0] // num_heads
    value_width = v.shape[0] // groups
    expected = {"k": (groups * width, dim), "v": (groups * value_width, dim), "out": (dim, num_heads * value_width)}
    for name, tensor in (("k", k), ("v", v), ("out", out)):
        if tuple(tensor.shape) != expected[name]:
            raise EspalierError(
                f"{name} has shape {tuple(tensor.shape)}, not {expected[name]} as {num_heads} heads of width {width} "
                f"over {dim} features need: pass weights of one self-attention layer"
            )


@torch.no_grad()
@full_precision()
def measure_attention(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, num_heads: int, num_kv_heads: int | None = None
) -> dict[str, float]:
    """Measure how near to a multiple of the identity a layer's two products are.

    Returns:
        ``qk_diagonal`` and ``qk_off`` (mean of the diagonal and standard deviation of the rest of W_Q W_Kᵀ, over the
        heads), ``vo_diagonal`` and ``vo_off`` (of Σ_h W_V,h W_proj,h), and ``qk_z``, ``vo_z``: how far the diagonal is
        from the other entries, in standard errors, as independent entries would scatter; ``qk_least_z`` is that of the
        head where it is least (negative in a head of the other sign). Least squares of a product on βI gives its
        diagonal mean, so these are also the fitted β, and ``off · √d`` the fitted α.

    Raises:
        EspalierError: as ``mimetic_attention_`` does of the weights, or they have no numbers (meta, fake tensors).
    """
    if why := next(filter(None, map(without_numbers, (q, k, v, out))), ""):
        raise EspalierError(f"the weights are {why}: load their numbers, then measure")
    groups, dim = num_heads if num_kv_heads is None else num_kv_heads, q.shape[-1]
    _check_shapes(q.flatten(0, -2), k.flatten(0, -2), v.flatten(0, -2), out, num_heads, groups)
    v_GKD = v.float().reshape(groups, -1, dim)
    out_DGHK = out.float().reshape(dim, groups, num_heads // groups, -1)
    vo = out_DGHK.sum(2).reshape(dim, -1) @ v_GKD.reshape(-1, dim)
    diagonal = vo.diagonal()
    vo_1 = Entries(*(part[None] for part in (diagonal.sum(), diagonal.square().sum(), vo.sum(), vo.square().sum())))
    qk_H = Entries.of_heads(q, k, num_heads, groups)
    qk_mean, qk_off, qk_z = qk_H.spread(dim)
    vo_mean, vo_off, vo_z = vo_1.spread(dim)
    return {
        "qk_diagonal": qk_mean,
        "qk_off": qk_off,
        "qk_z": qk_z,
        "qk_least_z": min(math.copysign(1.0, qk_mean) * z for _, _, z in qk_H.spread_of_each(dim)),
        "vo_diagonal": vo_mean,
        "vo_off": vo_off,
        "vo_z": vo_z,
    }


class Entries(NamedTuple):
    """Sums over the entries of (d, d) matrices, one figure a matrix."""

    trace: Tensor
    diagonal_square: Tensor
    total: Tensor
    square: Tensor

    @classmethod
    def of_heads(cls, q: Tensor, k: Tensor, num_heads: int, groups: int) -> Entries:
        """Return the sums over W_Q W_Kᵀ of every head, without ever holding a d × d matrix."""
        q_HKD = q.float().reshape(num_heads, -1, q.shape[-1])
        k_HKD = k.float().reshape(groups, -1, q.shape[-1]).repeat_interleave(num_heads // groups, 0)
        diagonals_HD = torch.stack([(a * b).sum(0) for a, b in zip(q_HKD, k_HKD, strict=True)])
        return cls(
            diagonals_HD.sum(1),
            diagonals_HD.square().sum(1),
            (q_HKD.sum(-1) * k_HKD.sum(-1)).sum(1),
            ((q_HKD @ q_HKD.mT) * (k_HKD @ k_HKD.mT)).sum((1, 2)),
        )

    def spread_of_each(self, dim: int) -> list[tuple[float, float, float]]:
        """Return what ``spread`` does, matrix by matrix."""
        return [Entries(*(part[index, None] for part in self)).spread(dim) for index in range(len(self.trace))]

    def spread(self, dim: int) -> tuple[float, float, float]:
        """Return the diagonal's mean, the other entries' root mean square, and the z of ``measure_attention``."""
        count, pairs = len(self.trace), max(len(self.trace) * dim * (dim - 1), 1)
        trace, diagonal_square, total, square = (float(part.double().sum()) for part in self)
        mean, off_mean = trace / (count * dim), (total - trace) / pairs
        off_square = max((square - diagonal_square) / pairs, 0.0)
        # The floor: sums in float32 say nothing below a thousandth of the entries' size.
        deviation = max(off_square - off_mean**2, 1e-6 * off_square, torch.finfo(torch.float32).tiny) ** 0.5
        return mean, off_square**0.5, (mean - off_mean) / deviation * (count * dim) ** 0.5


@lru_cache(maxsize=256)
@full_precision()
def truncated(alpha: float, beta: float, rank: float, rows: float = 1.0, columns: float = 1.0) -> Strength:
    """Return the strengths that the best approximation of ``αZ + βI`` in a share of its rank has.

    What truncation leaves depends on the shares alone, hardly on the width: one matrix of 192 rows stands for all.

    Args:
        alpha, beta: the strengths.
        rank: k/d.
        rows, columns: the shares of the width that latents leave of the input's space on either side.
    """
    if rank >= 1:
        return alpha, beta
    dim = round(_PILOT / max(rows, columns))
    sides = (max(round(rows * dim), 1), max(round(columns * dim), 1))
    seeded = torch.Generator(device="cpu").manual_seed(0)
    matrix = near_identity_corner(*sides, dim, alpha, beta, generator=seeded).float()
    left, right = split(matrix, max(1, round(rank * dim)))
    common = min(sides)
    diagonal = float((left[:common] * right[:common]).sum() / dim)
    square = float(((left.mT @ left) * (right.mT @ right)).sum()) / dim
    return max(square - diagonal**2, 0.0) ** 0.5, diagonal
