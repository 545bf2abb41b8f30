"""The family of self-attention: two products written, measured, judged and fitted, and what stands between them."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import nn

from espalier.init.attention.latent import mimetic_latent_attention_
from espalier.init.attention.mimetic import (
    PRESETS,
    Entries,
    Mimetic,
    Strength,
    measure_attention,
    mimetic_attention_,
    truncated,
)
from espalier.init.families.base import Family, Place
from espalier.init.layouts import AttentionWeights, LatentAttentionWeights
from espalier.init.layouts.registry import ROTARY, attribute
from espalier.init.layouts.scratch import is_bias

# A product counts as structured when its diagonal is this many standard errors from its other entries: with independent
# weights the figure is normal with deviation 1, and a structured layer of width 48 already shows more than 20.
_Z = 8.0
# How far a verified diagonal may be from the one asked for. Over a thousand kinds of layer with three seeds each what
# ``truncated`` finds on one matrix was up to a fifth off at a low rank, and none was four standard errors off.
_TOLERANCE = 0.25
_SCATTER = 8.0
_ANGLES = 25

AnyAttention = AttentionWeights | LatentAttentionWeights
# Shares of the width: what rank the best approximation of a product has, and what latents leave on its two sides.
Shares = tuple[float, float, float]

# What libraries call the things that change what a product means.
_QK_NORM = re.compile(
    r"(q|k|qk|query|key)_?(l|layer_?|rms_?)?(norm|ln)|(layer_?|rms_?)?(norm|ln)_?(q|k|qk|query|key)|logit_scale",
    re.IGNORECASE,
)
_OUTPUT_NORM = re.compile(
    r"(o|g|out|output|sub|attn_?sub|inner_?attn|attn|head|group)?_?(layer_?)?(norm|ln)", re.IGNORECASE
)
_GATE = re.compile(r"(\w+_)?gat(e|es|ed|ing)(_\w+)?|g_proj|to_gates?", re.IGNORECASE)
_ROTARY = re.compile(r"\w*(rotary|rope)\w*|freqs_cis", re.IGNORECASE)


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

    def __str__(self) -> str:
        heads = [sum(strengths) / len(self.qk_heads) for strengths in zip(*self.qk_heads, strict=True)]
        pairs = (heads, self.vo, self.qk_asked, self.vo_asked)
        fitted_qk, fitted_vo, qk, vo = (f"{pair[0]:.3g}·Z {pair[1]:+.3g}·I" for pair in pairs)
        return f"{self.layer or '(model)'}: qk {fitted_qk}, vo {fitted_vo}; ask for qk {qk}, vo {vo}"


class AttentionFamily(Family):
    """Self-attention, whose two products are set near multiples of the identity."""

    kind = "attention"
    default = Mimetic()
    row = AttentionFit

    def write(self, weights: AnyAttention, spec: Mimetic, place: Place, generator: torch.Generator) -> str:
        """Write both products and zero the biases; those of latent attention are left alone."""
        spec = spec.at(*place)
        if isinstance(weights, LatentAttentionWeights):
            mimetic_latent_attention_(weights, qk=spec.qk, vo=spec.vo, noise=spec.noise, generator=generator)
        else:
            mimetic_attention_(
                weights.q, weights.k, weights.v, weights.out, weights.num_heads, num_kv_heads=weights.num_kv_heads,
                qk=spec.qk, vo=spec.vo, noise=spec.noise, method=spec.method, generator=generator,
            )  # fmt: skip
            if weights.score_scale != 1:  # the scores get what was asked for: each factor carries half of it
                for part in (weights.q, weights.k):
                    part.mul_(weights.score_scale**-0.5)
            for bias in weights.biases:
                bias.zero_()
        pairs = (("qk", spec.qk), ("vo", spec.vo))
        return ", ".join(f"{name} {pair[0]:.4g}·Z {pair[1]:+.4g}·I" for name, pair in pairs if pair is not None)

    def measure(self, weights: AnyAttention) -> dict[str, float]:
        """Return the figures of ``measure_attention``, through latents where there are any, as they act on scores."""
        weights = _composed(weights)
        figures = measure_attention(
            weights.q, weights.k, weights.v, weights.out, weights.num_heads, weights.num_kv_heads
        )  # fmt: skip
        scale = weights.score_scale
        return {name: value * (scale if name in ("qk_diagonal", "qk_off") else 1) for name, value in figures.items()}

    def verify(self, weights: AnyAttention, spec: Mimetic, place: Place, measured: Mapping[str, float]) -> str:
        """Hold both diagonals against those that the best approximation of what was asked has."""
        dim, spec = len(weights.out), spec.at(*place)
        groups = weights.num_kv_heads if isinstance(weights, AttentionWeights) else weights.num_heads
        best = groups / weights.num_heads
        for name, pair, shares in zip(("qk", "vo"), (spec.qk, spec.vo), _shares(weights), strict=True):
            if pair is None:
                continue
            asked = truncated(*pair, *shares)[1]
            if name == "qk":
                # One query head a group has the best approximation; the others' targets meet a key head drawn without
                # them, which keeps the share of I that its rank is of the width.
                asked = best * asked + (1 - best) * pair[1] * shares[0]
            error = abs(measured[f"{name}_diagonal"] - asked)
            scatter = (abs(pair[0]) + abs(pair[1])) / dim**0.5
            means = dim * groups if name == "qk" else dim
            if not error <= _TOLERANCE * abs(asked) + _SCATTER * scatter / means**0.5:
                return f"{name} diagonal is {measured[f'{name}_diagonal']:.3g} where {asked:.3g} was written"
        return ""

    def scores(self, measured: Mapping[str, float]) -> dict[str, float]:
        """Return both products' scores, and that of the head whose query-key product stands out least."""
        names = {"qk": "qk_z", "qk of every head": "qk_least_z", "vo": "vo_z"}
        return {part: measured[name] / _Z for part, name in names.items() if name in measured}  # older reports have two

    def fit(self, name: str, weights: AnyAttention) -> AttentionFit:
        """Return the fit of every head, of values and outputs, and the strengths behind them."""
        qk_shares, vo_shares = _shares(weights)
        weights = _composed(weights)
        dim, scale = weights.q.shape[-1], weights.score_scale
        heads = Entries.of_heads(weights.q, weights.k, weights.num_heads, weights.num_kv_heads)
        pairs = tuple((scale * off * dim**0.5, scale * mean) for mean, off, _ in heads.spread_of_each(dim))
        measured = self.measure(weights)
        qk, vo = ((measured[f"{p}_off"] * dim**0.5, measured[f"{p}_diagonal"]) for p in ("qk", "vo"))
        return AttentionFit(name, pairs, vo, strength_behind(qk, *qk_shares), strength_behind(vo, *vo_shares))

    def spec(self, rows: Sequence[AttentionFit]) -> Mimetic | None:
        """Return the strengths of every layer; a model of another depth takes those between them."""
        return Mimetic(layers=tuple((row.qk_asked, row.vo_asked) for row in rows)) if rows else None

    def lines(self, rows: Sequence[AttentionFit]) -> list[str]:
        """Return a heading and a line a layer."""
        return ["layer: fitted qk (mean of heads) and vo as αZ + βI; the strengths to ask for", *map(str, rows)]

    def note(self, weights: AnyAttention, module: nn.Module) -> str:
        """Add to the layout's note what stands between the products and the scores or the output."""
        return "; ".join(filter(None, (weights.note, *_between(module, weights.note))))

    def remark(self, weights: AnyAttention, spec: Mimetic, module: nn.Module, model: nn.Module) -> str:
        """Warn where a causal model gets the strengths that were found on images."""
        vision = PRESETS["vision"]
        if spec.layers or (spec.qk != vision.qk and spec.vo != vision.vo) or not _is_causal(weights, module, model):
            return ""
        return (
            "its attention is causal and got the strengths of vision models, which nothing here shows to help on text: "
            'compare Mimetic.preset("language")'
        )


def _composed(weights: AnyAttention) -> AttentionWeights:
    return weights.composed() if isinstance(weights, LatentAttentionWeights) else weights


def _shares(weights: AnyAttention) -> tuple[Shares, Shares]:
    """Return the shares of the width that the products of queries and keys and of values and outputs have."""
    dim = len(weights.out)
    head = weights.q.numel() // weights.q.shape[-1] // weights.num_heads
    inner = weights.v.numel() // weights.v.shape[-1]
    q_side, kv_side = weights.q.shape[-1], weights.k.shape[-1]
    sides = ((min(head, q_side, kv_side), q_side, kv_side), (min(inner, kv_side), kv_side, dim))
    qk, vo = (tuple(round(side / dim, 4) for side in parts) for parts in sides)
    return qk, vo  # type: ignore[return-value]


def _between(module: nn.Module, said: str) -> Iterator[str]:
    """Yield what changes the meaning of the products, known by names of parts and arguments, unless said already."""
    parts = [name for name, part in module.named_modules() if not isinstance(part, nn.Identity)]
    names = {name.rpartition(".")[2] for name in (*parts, *dict(module.named_parameters()))}
    arguments = inspect.signature(module.forward).parameters
    turned = any(map(_ROTARY.fullmatch, (*names, *arguments))) or "tuple" in str(
        getattr(arguments.get("position_embeddings"), "annotation", "")
    )
    if turned and "rotary" not in said:
        yield ROTARY
    if any(map(_QK_NORM.fullmatch, names)) and "are normalised" not in said:
        yield "queries and keys are normalised: their product holds up to scale"
    # A norm that is registered before the projections acts on the input.
    children = {name: part for name, part in module.named_children() if not isinstance(part, nn.Identity)}
    matrices = [name for name, part in children.items() if any(weight.ndim == 2 for weight in part.parameters())]
    first = list(children).index(matrices[0]) if matrices else 0
    before, after = list(children)[:first], list(children)[first:]
    norms = [n for n, part in children.items() if "norm" in type(part).__name__.lower() and not _QK_NORM.fullmatch(n)]
    if any(n in before or not _OUTPUT_NORM.fullmatch(n) for n in norms):
        yield "a norm stands before the projections: both products hold for its output"
    own = [name for name, parameter in module.named_parameters(recurse=False) if parameter.ndim <= 1]
    scales = [name for name in own if not is_bias(module, name) and "sink" not in name]
    if scales and "scale" not in said:
        yield f"learned numbers of its own ({', '.join(scales)}): its products hold up to scale"
    if any(map(_OUTPUT_NORM.fullmatch, after)) and "before the output projection" not in said:
        yield "a norm stands before the output projection: the VO product holds up to scale"
    if any(map(_GATE.fullmatch, names)) and "gate" not in said:
        yield "gated: the VO product holds before the gate"


def _is_causal(weights: AnyAttention, module: nn.Module, model: nn.Module) -> bool:
    """Return whether a token sees only earlier ones: as the views say, else the module, its class, or the model."""
    if weights.causal is not None:
        return weights.causal
    stated = [part.is_causal for part in module.modules() if isinstance(attribute(part, "is_causal"), bool)]
    if stated:
        return any(stated)
    names = "".join(type(part).__name__ for part in (module, model))
    decoder = attribute(attribute(model, "config"), "is_decoder") is True
    return decoder or "Causal" in names or type(model).__name__.endswith("LMHeadModel")


def strength_behind(fitted: Strength, rank: float, rows: float = 1.0, columns: float = 1.0) -> Strength:
    """Return the (α, β) whose best approximation in a share of the rank has the fitted strengths.

    Truncation scales with its target, so only the angle between α and β has to be found: the angle of the fitted pair
    is a rising function of it, tabulated on one matrix of 192 rows. A pair nearer to the identity than any truncated
    one can be is taken for the identity alone.

    Args:
        fitted: (α, β) of a product of rank k.
        rank, rows, columns: shares of the width, see ``truncated``.
    """
    if rank >= 1:
        return fitted
    alpha, beta = fitted
    norm, angle = math.hypot(alpha, beta), math.atan2(abs(beta), alpha)
    angles, kept = _truncation(round(rank, 4), rows, columns)
    place = float(np.interp(angle, angles, range(_ANGLES)))
    asked = place / (_ANGLES - 1) * math.pi / 2
    size = norm / float(np.interp(place, range(_ANGLES), kept))
    if angle > angles[-1]:  # the identity alone, cut along axes: it leaves no Z, and its size is that of its diagonal
        size = abs(beta) / (kept[-1] * math.sin(angles[-1]))
    return size * math.cos(asked), math.copysign(size * math.sin(asked), beta)


@lru_cache(maxsize=32)
def _truncation(rank: float, rows: float, columns: float) -> tuple[list[float], list[float]]:
    """Return, for targets cosθ·Z + sinθ·I with θ from 0 to π/2, the angle and the size of what truncation leaves."""
    angles, sizes = [], []
    for step in range(_ANGLES):
        theta = step / (_ANGLES - 1) * math.pi / 2
        alpha, beta = truncated(math.cos(theta), math.sin(theta), rank, rows, columns)
        angles.append(math.atan2(max(beta, 0.0), alpha))
        sizes.append(math.hypot(alpha, beta))
    return angles, sizes
