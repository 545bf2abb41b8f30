"""The families of layers that carry structure: how each is written, measured and judged. A new one is one entry."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from espalier.init.attention import Mimetic, expected_diagonal, measure_attention, mimetic_attention_
from espalier.init.depthwise import FilterCovariance
from espalier.init.filter_fit import FilterFit, covariance_fit
from espalier.init.layouts import AttentionWeights, DepthwiseWeights, SSMWeights
from espalier.init.ssm import MimeticSSM, measure_ssm, mimetic_ssm_

# Index of a layer and number of layers, within its family.
Place = tuple[int, int]

# An attention product counts as structured when its diagonal is this many standard errors from zero: with independent
# weights the figure is normal with deviation 1, and a structured layer of width 48 already shows more than 20.
_PRESENT_Z = 8.0
# What a state-space layer must show for a part to count as there. The reference's random start is far from each: its
# rates are at least 1, its steps at most 0.1, and its taps are 1.15 from a delta.
_PRESENT_RATE = 0.5
_PRESENT_STEP = 0.3
_PRESENT_TAPS = 0.5
# How far a verified diagonal may be from the one asked for, beside the sampling error of its noise.
_TOLERANCE = 0.1


@dataclass(frozen=True)
class Family:
    """One kind of layer.

    Attributes:
        kind: the keyword of ``structure_`` and the word in reports.
        weights: the class of views that its layouts return.
        write: ``(weights, spec, place, generator)`` writes and returns in words what was asked.
        measure: weights to figures.
        parts: which of its structures the figures show, by name; none of them is a layer without structure.
        contradiction: what the figures contradict in what was asked, in words, or the empty string.
        chooses: ``(spec, place)`` to whether the layer is one of those asked for.
    """

    kind: str
    weights: type
    write: Callable[[Any, Any, Place, torch.Generator], str]
    measure: Callable[[Any], dict[str, float]]
    parts: Callable[[Mapping[str, float]], frozenset[str]]
    contradiction: Callable[[Any, Any, Place, Mapping[str, float]], str]
    chooses: Callable[[Any, Place], bool] = lambda spec, place: True

    def device(self, weights: Any) -> torch.device:
        """Return where the weights live."""
        return _first(weights).device

    def on_meta(self, weights: Any) -> bool:
        """Return whether the weights have no storage yet."""
        return _first(weights).is_meta

    def fingerprint(self, weights: Any) -> tuple[float, ...]:
        """Return the sum of every view: enough to see that another layer has written to the same storage."""
        return tuple(float(value.sum()) for value in vars(weights).values() if isinstance(value, Tensor))

    def bits(self, weights: Any) -> str:
        """Return a digest of every view's exact values and type."""
        digest = hashlib.blake2b(digest_size=16)
        for value in vars(weights).values():
            for part in value if isinstance(value, tuple) else (value,):
                if isinstance(part, Tensor):
                    digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
                    digest.update(part.contiguous().cpu().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def note(self, weights: Any) -> str:
        """Return what the layout had to say of this layer."""
        return getattr(weights, "note", "")


def _first(weights: Any) -> Tensor:
    return next(value for value in vars(weights).values() if isinstance(value, Tensor))


def _named(**shown: bool) -> frozenset[str]:
    return frozenset(name for name, there in shown.items() if there)


def _write_attention(weights: AttentionWeights, spec: Mimetic, place: Place, generator: torch.Generator) -> str:
    spec = spec.at(*place)
    mimetic_attention_(
        weights.q, weights.k, weights.v, weights.out, weights.num_heads, num_kv_heads=weights.num_kv_heads,
        qk=spec.qk, vo=spec.vo, noise=spec.noise, method=spec.method, generator=generator,
    )  # fmt: skip
    for bias in weights.biases:
        bias.zero_()
    pairs = (("qk", spec.qk), ("vo", spec.vo))
    return ", ".join(f"{name} {pair[0]:.4g}·Z {pair[1]:+.4g}·I" for name, pair in pairs if pair is not None)


def _measure_attention(weights: AttentionWeights) -> dict[str, float]:
    return measure_attention(
        weights.q, weights.k, weights.v, weights.out, weights.num_heads, weights.num_kv_heads
    )  # fmt: skip


def _attention_parts(measured: Mapping[str, float]) -> frozenset[str]:
    return _named(products=max(abs(measured["qk_z"]), abs(measured["vo_z"])) >= _PRESENT_Z)


def _attention_contradiction(
    weights: AttentionWeights, spec: Mimetic, place: Place, measured: Mapping[str, float]
) -> str:
    dim = weights.q.shape[-1]
    head_share = weights.q.numel() / weights.num_heads / dim**2
    rank_share = min(weights.v.numel() / dim**2, 1.0)
    # With grouped queries only one query head in a group has the best approximation; the others keep less of it.
    slack = _TOLERANCE if weights.num_heads == weights.num_kv_heads else 1.0
    spec = spec.at(*place)
    for name, pair, share in (("qk", spec.qk, head_share), ("vo", spec.vo, rank_share)):
        if pair is None:
            continue
        asked = expected_diagonal(*pair, round(share, 4))
        error = abs(measured[f"{name}_diagonal"] - asked)
        scatter = (abs(pair[0]) + abs(pair[1])) / dim**0.5
        if not error <= slack * abs(asked) + 6 * scatter / (weights.num_heads if name == "qk" else dim) ** 0.5:
            return f"{name} diagonal is {measured[f'{name}_diagonal']:.3g} where {asked:.3g} was written"
    return ""


def _write_depthwise(
    weights: DepthwiseWeights, spec: FilterCovariance, place: Place, generator: torch.Generator
) -> str:
    spec = replace(spec, centre=weights.centre) if weights.centre != "middle" else spec
    return spec.write_(weights.weight, spec.depth_of(*place), generator=generator)


def _measure_depthwise(weights: DepthwiseWeights) -> dict[str, float]:
    return covariance_fit(weights.weight)._asdict()


def _depthwise_parts(measured: Mapping[str, float]) -> frozenset[str]:
    return _named(covariance=FilterFit(**measured).structured)


def _depthwise_contradiction(
    weights: DepthwiseWeights, spec: FilterCovariance, place: Place, measured: Mapping[str, float]
) -> str:
    # The covariance of a layer's few filters says too little to hold a particular σ against them; a layer that another
    # one overwrote is found by its figures, which are no longer those measured after writing.
    return ""


def _write_ssm(weights: SSMWeights, spec: MimeticSSM, place: Place, generator: torch.Generator) -> str:
    mimetic_ssm_(
        weights.w_b, weights.w_c, weights.a_log, weights.delta_bias, w_delta=weights.w_delta,
        conv_weight=weights.conv_weight, conv_bias=weights.conv_bias, groups=weights.groups,
        generator=generator, **spec.parts,
    )  # fmt: skip
    # A host's further biases would shift what was just written.
    for bias in weights.map_biases if spec.correlate is not None else ():
        bias.zero_()
    for bias in weights.delta_shifts if spec.delta is not None else ():
        bias.zero_()
    return spec.in_words()


def _measure_ssm(weights: SSMWeights) -> dict[str, float]:
    delta_bias = sum(weights.delta_shifts, weights.delta_bias)
    return measure_ssm(weights.w_b, weights.w_c, weights.a_log, delta_bias, weights.conv_weight, weights.groups)


def _ssm_parts(measured: Mapping[str, float]) -> frozenset[str]:
    return _named(
        decay=measured["rate"] <= _PRESENT_RATE,
        delta=measured["delta"] >= _PRESENT_STEP,
        correlate=abs(measured["correlation_z"]) >= _PRESENT_Z,
        convolution=measured.get("convolution", 1.0) <= _PRESENT_TAPS,
    )


def _ssm_contradiction(weights: SSMWeights, spec: MimeticSSM, place: Place, measured: Mapping[str, float]) -> str:
    rho = 0.0 if spec.correlate is None else spec.correlate
    for name, asked, slack in (
        # Slack: rounding of the bias to bfloat16; the scatter of a sum of N·D independent products.
        ("delta", spec.delta, 0.02 * (spec.delta or 0.0)),
        ("correlation", spec.correlate, 0.01 + 6 * (1 - rho**2) / weights.w_b.numel() ** 0.5),
        ("convolution", 0.0 if spec.convolution is True else None, 0.0),
    ):
        if asked is not None and not abs(measured[name] - asked) <= slack:
            return f"{name} is {measured[name]:.3g} where {asked:.3g} was written"
    return ""


FAMILIES: tuple[Family, ...] = (
    Family(
        "attention",
        AttentionWeights,
        _write_attention,
        _measure_attention,
        _attention_parts,
        _attention_contradiction,
    ),
    Family(
        "ssm",
        SSMWeights,
        _write_ssm,
        _measure_ssm,
        _ssm_parts,
        _ssm_contradiction,
        lambda spec, place: spec.chooses(*place),
    ),
    Family(
        "depthwise",
        DepthwiseWeights,
        _write_depthwise,
        _measure_depthwise,
        _depthwise_parts,
        _depthwise_contradiction,
    ),
)
