"""Read strengths off a trained model: the arguments with which ``structure_`` starts another model like this one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from espalier.errors import EspalierError
from espalier.init.attention.mimetic import Mimetic, Strength, as_tuples, measure_attention
from espalier.init.attention.near_identity import near_identity, split
from espalier.init.filters.spec import FilterCovariance
from espalier.init.fit_families import DepthwiseFit, SSMFit, filter_spec, fit_depthwise, fit_ssm, ssm_spec
from espalier.init.layouts import AttentionWeights, DepthwiseWeights, SSMWeights, find_layers
from espalier.init.ssm import MimeticSSM

# The law of a truncated αZ + βI depends on the width hardly at all, so one width tells it for all.
_PILOT = 192
_ANGLES = 25


@dataclass(frozen=True)
class AttentionFit:
    """What one layer's products are near to.

    Attributes:
        layer: its name.
        qk_heads: (α, β) of every head: least squares of W_Q W_Kᵀ on αZ + βI, with Z's entries of variance 1/d.
        vo: (α, β) of Σ_h W_V,h W_proj,h, in the same way.
        qk_asked, vo_asked: the strengths that ``Mimetic`` must be given for products of this size. A product of rank
            k < d keeps only part of what is asked, so these are larger than the fitted ones.
    """

    layer: str
    qk_heads: tuple[Strength, ...]
    vo: Strength
    qk_asked: Strength
    vo_asked: Strength


@dataclass(frozen=True)
class StructureFit:
    """The fits of a model's layers, in module order and family by family; prints as a table.

    Attributes:
        layers: attention.
        state_space: state-space mixers.
        filters: depthwise filters.
    """

    layers: tuple[AttentionFit, ...]
    state_space: tuple[SSMFit, ...] = ()
    filters: tuple[DepthwiseFit, ...] = ()

    def mimetic(self, **changes: Any) -> Mimetic:
        """Return the spec that starts another model like this one, of any depth; ``changes`` are other fields of it.

        Raises:
            EspalierError: the model had no attention.
        """
        if not self.layers:
            raise EspalierError("fit has no attention layers: use specs(), which leaves out what was not there")
        return Mimetic(layers=tuple((row.qk_asked, row.vo_asked) for row in self.layers), **changes)

    def specs(self) -> dict[str, Mimetic | MimeticSSM | FilterCovariance | None]:
        """Return the arguments of ``structure_``; ``None`` for a family that the model had none of."""
        filters = [row for row in self.filters if math.isfinite(row.sigma)]
        return {
            "attention": self.mimetic() if self.layers else None,
            "ssm": ssm_spec(self.state_space) if self.state_space else None,
            "depthwise": filter_spec(filters) if filters else None,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists and dictionaries for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StructureFit:
        """Return the fit that ``to_dict`` gave."""
        rows = [{key: as_tuples(value) for key, value in row.items()} for row in data["layers"]]
        return cls(
            tuple(AttentionFit(**row) for row in rows),
            tuple(SSMFit(**row) for row in data.get("state_space", ())),
            tuple(DepthwiseFit(**row) for row in data.get("filters", ())),
        )

    def __str__(self) -> str:
        lines = []
        if self.layers:
            lines.append("layer: fitted qk (mean of heads) and vo as αZ + βI; the strengths to ask for")
        for row in self.layers:
            heads = torch.tensor(row.qk_heads).mean(0).tolist()
            pairs = (heads, row.vo, row.qk_asked, row.vo_asked)
            fitted_qk, fitted_vo, qk, vo = (f"{pair[0]:.3g}·Z {pair[1]:+.3g}·I" for pair in pairs)
            lines.append(f"{row.layer or '(model)'}: qk {fitted_qk}, vo {fitted_vo}; ask for qk {qk}, vo {vo}")
        specs = self.specs()
        if isinstance(ssm := specs["ssm"], MimeticSSM):
            lines += [*map(str, self.state_space), f"ask for {ssm.in_words()}"]
        lines += map(str, self.filters)
        if isinstance(filters := specs["depthwise"], FilterCovariance):
            lines.append(f"ask for sigma0={filters.sigma0:.3g}, v={filters.v:.3g}, a={filters.a:.3g}")
        return "\n".join(lines)


def fit(model: nn.Module) -> StructureFit:
    """Fit every layer that a layout recognises and say what to ask ``structure_`` for.

    Attention: both products to αZ + βI. State-space layers: Ā, Δ, the correlation of W_C and W_B, the convolution.
    Depthwise filters: σ of the closed form. ``structure_(other, **fit(trained).specs())`` starts another model, of any
    width and depth, with this one's strengths: the noise is fresh, only its size and the identity's are taken over.

    Args:
        model: a trained model, or what ``skeleton`` makes of a checkpoint.

    Raises:
        EspalierError: the model has no layer that a layout recognises.
    """
    found = [(name, weights) for name, _, weights in find_layers(model)]
    fitted = StructureFit(
        tuple(_fit(name, weights) for name, weights in found if isinstance(weights, AttentionWeights)),
        tuple(fit_ssm(name, weights) for name, weights in found if isinstance(weights, SSMWeights)),
        tuple(fit_depthwise(name, weights) for name, weights in found if isinstance(weights, DepthwiseWeights)),
    )
    if not (fitted.layers or fitted.state_space or fitted.filters):
        raise EspalierError(f"model {type(model).__name__} has no structure to fit: register a layout for its layers")
    return fitted


def _fit(name: str, weights: AttentionWeights) -> AttentionFit:
    dim, heads = weights.q.shape[-1], weights.num_heads
    shared = heads // weights.num_kv_heads
    q_HKD = weights.q.reshape(heads, -1, dim)
    k_HKD = weights.k.reshape(weights.num_kv_heads, -1, dim).repeat_interleave(shared, 0)
    pairs = tuple(_head_strength(q, k) for q, k in zip(q_HKD, k_HKD, strict=True))
    measured = measure_attention(weights.q, weights.k, weights.v, weights.out, heads, weights.num_kv_heads)
    qk, vo = ((measured[f"{p}_off"] * dim**0.5, measured[f"{p}_diagonal"]) for p in ("qk", "vo"))
    fractions = (q_HKD.shape[1] / dim, weights.v.numel() / dim**2)
    return AttentionFit(name, pairs, vo, strength_behind(qk, fractions[0]), strength_behind(vo, fractions[1]))


def _head_strength(q_KD: Tensor, k_KD: Tensor) -> Strength:
    """Return (α, β) of one head, without ever holding a d × d matrix."""
    q, k = q_KD.float(), k_KD.float()
    dim = q.shape[1]
    diagonal = (q * k).sum(0)
    square = ((q @ q.mT) * (k @ k.mT)).sum() - diagonal.square().sum()
    return float((square.clamp_min(0) / max(dim - 1, 1)).sqrt()), float(diagonal.mean())


def strength_behind(fitted: Strength, fraction: float) -> Strength:
    """Return the (α, β) whose best approximation in ``fraction`` of the rank has the fitted strengths.

    Truncation scales with its target, so only the angle between α and β has to be found: the angle of the fitted pair
    is a rising function of it, tabulated on one matrix of 192 rows. A pair nearer to the identity than any truncated
    one can be is taken for the identity alone.

    Args:
        fitted: (α, β) of a product of rank k.
        fraction: k/d.
    """
    if fraction >= 1:
        return fitted
    alpha, beta = fitted
    norm, angle = math.hypot(alpha, beta), math.atan2(abs(beta), alpha)
    angles, kept = _truncation(round(fraction, 4))
    place = min(max(sum(a <= angle for a in angles) - 1, 0), _ANGLES - 2)
    step = angles[place + 1] - angles[place]
    share = min(max((angle - angles[place]) / step if step > 0 else 1.0, 0.0), 1.0)
    asked = (place + share) / (_ANGLES - 1) * math.pi / 2
    size = norm / (kept[place] + share * (kept[place + 1] - kept[place]))
    return size * math.cos(asked), math.copysign(size * math.sin(asked), beta)


@lru_cache(maxsize=32)
def _truncation(fraction: float) -> tuple[list[float], list[float]]:
    """Return, for targets cosθ·Z + sinθ·I with θ from 0 to π/2, the angle and the size of what truncation leaves."""
    angles, sizes = [], []
    rank = max(1, round(fraction * _PILOT))
    for step in range(_ANGLES):
        theta = step / (_ANGLES - 1) * math.pi / 2
        target = near_identity(_PILOT, math.cos(theta), math.sin(theta), generator=torch.Generator().manual_seed(0))
        left, right = split(target, rank)
        alpha, beta = _head_strength(left.mT, right.mT)
        angles.append(math.atan2(max(beta, 0.0), alpha))
        sizes.append(math.hypot(alpha, beta))
    return angles, sizes
