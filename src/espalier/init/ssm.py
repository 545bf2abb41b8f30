"""Mimetic initialisation of state-space layers: start a Mamba as causal linear attention that forgets nothing."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal, TypedDict, Unpack, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from espalier.contents import without_numbers
from espalier.errors import EspalierError, unknown_name
from espalier.init.filters.spec import FilterCovariance
from espalier.randomness import cpu_generator

DecayRule = Literal["constant", "scaled"]
Convolution = bool | Literal["covariance"]

# exp(−20) is 2e-9: below it exp(Δ·A) is 1 in float32 for every Δ that occurs, and only the gradient would vanish.
_LOWEST_LOG_RATE = -20.0
# The reference implementations draw the rates of Mamba-2's heads from here; Mamba-1's are 1, …, N in every channel.
_REFERENCE_RATES = (1.0, 16.0)
_LARGEST = sys.float_info.max
# What each number may be, both ends included. A step outside of these has a bias below −40 or above 100, which is dead.
_NUMBERS = {
    "decay": (0.0, _LARGEST, "a finite number of at least 0"),
    "delta": (math.log1p(math.exp(-40)), 100.0, "a step from 4.3e-18 to 100"),
    "correlate": (-1.0, 1.0, "a correlation in −1…1"),
    "gain": (sys.float_info.min, _LARGEST, "a positive, finite number"),
    "delta_weight": (0.0, _LARGEST, "a finite number of at least 0"),
}


class SSMParts(TypedDict, total=False):
    """The parts of ``MimeticSSM``, which says what each does, as keyword arguments."""

    decay: float | None
    delta: float | None
    correlate: float | None
    convolution: Convolution
    decay_rule: DecayRule
    gain: float | None
    delta_weight: float | None


@dataclass(frozen=True)
class MimeticSSM:
    """What to write into state-space layers: four parts, each on its own; ``None`` or ``False`` leaves a part alone.

    Attributes:
        decay: c; the rates become ``−A = exp(−c)``, at least exp(−20), so that a state keeps almost all of itself at
            every step.
        delta: the step size at zero input, written into the step's bias.
        correlate: ρ between the rows of W_C and W_B.
        convolution: whether the short convolution starts as the identity; ``"covariance"`` instead draws its filters
            from the closed form of ``FilterCovariance`` at half depth, centred on the newest tap (an option of ours).
        decay_rule: ``"constant"``, or ``"scaled"`` for rates ``exp(−c·A_log₀)`` with the reference's A_log₀.
        gain: the diagonal of ``W_Cᵀ W_B`` over ρ; ``None`` keeps W_B as it is, see Note [Scale of the product].
        delta_weight: size of the step's input weights over the default's; 0 makes steps independent of the input.
        layers: which of the model's state-space layers, counted in module order from 0 (negative: from the end).

    Raises:
        EspalierError: an argument out of range.

    Source: arXiv 2410.11135; what is not said there is marked in ``mimetic_ssm_``.
    """

    decay: float | None = 8.0
    delta: float | None = 1.0
    correlate: float | None = 1.0
    convolution: Convolution = False
    decay_rule: DecayRule = "constant"
    gain: float | None = None
    delta_weight: float | None = None
    layers: Literal["all"] | int | Sequence[int] = "all"

    def __post_init__(self) -> None:
        if self.decay_rule not in get_args(DecayRule):
            raise unknown_name("decay_rule", self.decay_rule, get_args(DecayRule))
        if not (isinstance(self.convolution, bool) or self.convolution == "covariance"):
            raise EspalierError(f"convolution is {self.convolution!r}: give False, True or 'covariance'")
        for name, (low, high, words) in _NUMBERS.items():
            value = getattr(self, name)
            is_number = isinstance(value, Real) and not isinstance(value, bool)  # decay=True would be c = 1
            if value is not None and not (is_number and low <= value <= high):
                raise EspalierError(f"{name} is {value!r}: give {words}")
        if isinstance(self.layers, Sequence) and not isinstance(self.layers, str):
            # A tuple, so that a value that came from JSON equals the one that went in.
            object.__setattr__(self, "layers", tuple(self.layers))
        wanted = self.layers if isinstance(self.layers, tuple) else (self.layers,)
        if self.layers != "all" and not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in wanted):
            raise EspalierError(f"layers is {self.layers!r}: give 'all', an index, or a list of indices")

    @property
    def parts(self) -> SSMParts:
        """The keyword arguments of ``mimetic_ssm_``."""
        return {name: getattr(self, name) for name in SSMParts.__annotations__}  # type: ignore[return-value]

    def describe(self) -> str:
        """Return what is asked for, as reports show it."""
        exponent = "" if self.decay is None else f"{self.decay:g}" + ("·A_log" if self.decay_rule == "scaled" else "")
        parts = (
            (self.decay, f"A −exp(−{exponent})"),
            (self.delta, f"Δ {self.delta:.4g}" if self.delta is not None else ""),
            (self.correlate, f"ρ {self.correlate:.4g}" if self.correlate is not None else ""),
            (self.convolution or None, f"{'identity' if self.convolution is True else 'covariance'} convolution"),
            (self.delta_weight, f"W_Δ ×{self.delta_weight}"),
        )
        return ", ".join(text for value, text in parts if value is not None)

    def selects(self, index: int, count: int) -> bool:
        """Return whether layer ``index`` of ``count`` is one of ``layers``.

        Raises:
            EspalierError: ``layers`` names a layer that is not there.
        """
        if isinstance(self.layers, str):
            return True
        wanted = (self.layers,) if isinstance(self.layers, int) else self.layers
        for layer in wanted:
            if not -count <= layer < count:
                raise EspalierError(f"layers names {layer} and the model has {count} state-space layers: count from 0")
        return index in {layer % count for layer in wanted}


@torch.no_grad()
def mimetic_ssm_(
    w_b: Tensor,
    w_c: Tensor,
    a_log: Tensor,
    delta_bias: Tensor,
    *,
    w_delta: Tensor | None = None,
    conv_weight: Tensor | None = None,
    conv_bias: Tensor | None = None,
    groups: int = 1,
    generator: torch.Generator | None = None,
    **parts: Unpack[SSMParts],
) -> None:
    """Write mimetic structure into one state-space layer's weights, in place; a tensor or part left out is left alone.

    With ``h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t x_t``, ``y_t = C_t·h_t`` and ``Δ_t = softplus(W_Δ u_t + b_Δ)``:

    ============== =======================================================================================
    decay          ``a_log = −c``, at least −20: Ā = exp(Δ A) is near 1; see Note [Two readings of the decay]
    delta          ``b_Δ = softplus⁻¹(Δ)``
    correlate      ``W_C = ρ W_B + √(1 − ρ²) W′``, W′ normal with the mean square of W_B
    gain           first draws W_B from the normal of variance gain/N, so that ``W_Cᵀ W_B`` is ``gain·ρ·I``
                   plus noise of deviation gain/√N
    convolution    the newest tap 1, the others and the bias 0; or filters of a covariance, the bias left alone
    delta_weight   W_Δ uniform on ±f/√fan-in, the default's distribution times f
    ============== =======================================================================================

    Then ``y_t = Σ_{s≤t} (C_t·B_s) x_s``: causal linear attention with queries C and keys B.

    Args:
        w_b: W_B, (G·N, width of u); G groups of N rows each.
        w_c: W_C, of the same shape.
        a_log: logarithms of the rates, (channels, N) in Mamba-1, (heads,) in Mamba-2.
        delta_bias: b_Δ, one a channel or head.
        w_delta: W_Δ, (channels or heads, fan-in).
        conv_weight: taps of the causal depthwise convolution, (channels, 1, K), the newest last.
        conv_bias: its bias.
        groups: G.
        generator: source of W_B, W′, W_Δ and of the rates of ``"scaled"``.
        parts: what to write, see ``MimeticSSM``: c, Δ, ρ, f and the rest.

    Raises:
        EspalierError: shapes that do not fit together, or an argument out of range.

    Source: arXiv 2410.11135. The distribution of W′, its scale and the constant rule are ours.
    """
    spec = MimeticSSM(**parts)
    _check_shapes(w_b, w_c, groups)
    if spec.convolution and conv_weight is not None and conv_weight.numel():  # first: it may refuse, on meta too
        _write_taps(conv_weight, conv_bias, spec.convolution, generator)
    if without_numbers(w_b) or w_b.numel() == 0:
        return
    if spec.decay is not None:
        _write_rates(a_log, spec.decay, spec.decay_rule, generator)
    if spec.delta is not None:
        delta_bias.fill_(inverse_softplus(spec.delta))
    if spec.correlate is not None:
        _correlate(w_b, w_c, spec.correlate, w_b.shape[0] // groups, spec.gain, generator)
    if spec.delta_weight is not None and w_delta is not None:
        w_delta.copy_(spec.delta_weight * w_delta.shape[1] ** -0.5 * (2 * _noise(torch.rand, w_delta, generator) - 1))


# Note [Two readings of the decay]
# Published is A = −exp(−c·A_log) with c = 8; whether c acts in every forward pass or once, at the start, is not said to
# us. Both give the same first step, and only the second leaves every kernel and checkpoint as it is, so it is ours.
# Read literally, the default A_log₀ = log 1 of Mamba-1's first state (and of the slowest heads of Mamba-2) stays 0:
# that state still forgets by exp(−Δ) a step, the opposite of what is wanted, while A_log₀ = log 16 falls to −22.
# "constant" writes the same A_log = −c everywhere: |A| = 3.4e-4 for c = 8, half of a token left after 2000 steps of
# Δ = 1. "scaled" is the literal reading. It starts from the reference's A_log₀ and not from the layer's own values,
# which a second call would turn into exp(+64·A_log₀).
def _write_rates(a_log: Tensor, decay: float, rule: DecayRule, generator: torch.Generator | None) -> None:
    if rule == "constant":
        a_log.fill_(max(-decay, _LOWEST_LOG_RATE))
        return
    if a_log.ndim == 2:
        rates = torch.arange(1, a_log.shape[1] + 1, dtype=torch.float64, device="cpu")
    else:
        low, high = _REFERENCE_RATES
        rates = low + (high - low) * _noise(torch.rand, a_log, generator)
    a_log.copy_((-decay * rates.log()).clamp_min(_LOWEST_LOG_RATE).expand_as(a_log))


# Note [Scale of the product]
# W_Cᵀ W_B is near I when W_B has entries of variance 1/N; torch's default has 1/3D, and gives (N/3D)·I. Nothing
# normalises the output of Mamba-1's recurrence, which without decay also grows with the length: with gain 1 its
# output is some tens of times its input after a few hundred tokens, and the residual stream is drowned. With W_B kept
# it stays below the input, and the form of the product is the same. Mamba-2 normalises, and hardly minds.
def _correlate(
    w_b: Tensor, w_c: Tensor, rho: float, state_size: int, gain: float | None, generator: torch.Generator | None
) -> None:
    if gain is None:
        keys = w_b.cpu().double()
        deviation = float(keys.square().mean().sqrt())
    else:
        deviation = (gain / state_size) ** 0.5
        keys = deviation * _noise(torch.randn, w_b, generator)
        w_b.copy_(keys)
    w_c.copy_(rho * keys + (1 - rho**2) ** 0.5 * deviation * _noise(torch.randn, w_b, generator))


def _noise(sampler: Callable[..., Tensor], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw numbers of a tensor's shape in float64 on the CPU: the same ones for every device and type of weights."""
    return sampler(like.shape, generator=cpu_generator(generator), dtype=torch.float64, device="cpu")


def _write_taps(
    conv_weight: Tensor, conv_bias: Tensor | None, rule: Convolution, generator: torch.Generator | None
) -> None:
    if rule == "covariance":
        FilterCovariance(centre="last").write_(conv_weight, 0.5, generator=generator)
        return
    conv_weight.zero_()
    conv_weight[..., -1].fill_(1)
    if conv_bias is not None:
        conv_bias.zero_()


def inverse_softplus(value: float) -> float:
    """Return b with ``softplus(b) = value``: ``value + log(1 − exp(−value))``, which loses no digits at either end."""
    return value + math.log(-math.expm1(-value))


def _check_shapes(w_b: Tensor, w_c: Tensor, groups: int) -> None:
    if w_b.ndim != 2 or w_b.shape != w_c.shape:
        raise EspalierError(
            f"w_b has shape {tuple(w_b.shape)} and w_c {tuple(w_c.shape)}: give both as (groups·N, width)"
        )
    if groups < 1 or w_b.shape[0] % groups:
        raise EspalierError(f"groups {groups} does not divide the {w_b.shape[0]} rows of w_b: choose a divisor")


@torch.no_grad()
def token_memory(a_log: Tensor, delta_bias: Tensor, steps: int) -> float:
    """Return how much of a token is left after ``steps`` further tokens of zero input: the mean of Ā^steps.

    ``Ā = exp(−softplus(b_Δ)·exp(a_log))``, the mean over the channels' states (Mamba-1) or the heads (Mamba-2). It is
    what the recurrence gives for a pulse, read out with equal weights on all states, over what it gives at the pulse.

    Args:
        a_log: (channels, N) or (heads,).
        delta_bias: (channels,) or (heads,).
        steps: n ≥ 0.
    """
    delta = F.softplus(delta_bias.double())
    log_decay = -(delta[:, None] if a_log.ndim == 2 else delta) * a_log.double().exp()
    return float((steps * log_decay).exp().mean())


@torch.no_grad()
def measure_ssm(
    w_b: Tensor, w_c: Tensor, a_log: Tensor, delta_bias: Tensor, conv_weight: Tensor | None = None, groups: int = 1
) -> dict[str, float]:
    """Measure how near a layer is to causal linear attention that forgets nothing.

    Returns:
        ``rate`` (the mean of −A), ``decay`` (the mean of Ā at zero input), ``delta`` (the mean of Δ there),
        ``correlation`` (the cosine of W_C and W_B), ``correlation_z`` (the same in standard errors, as independent
        entries would scatter), ``diagonal`` (the mean diagonal of W_Cᵀ W_B, over the groups), ``memory_16`` and
        ``memory_64`` (how much of a token is left after as many steps), and ``convolution`` (the distance of the taps
        from a delta over the delta's own norm: 0 is the identity, and torch's default with 4 taps is near 1.15).

    Raises:
        EspalierError: the weights have no numbers (meta, fake tensors).
    """
    if why := next(filter(None, map(without_numbers, (w_b, w_c, a_log, delta_bias))), ""):
        raise EspalierError(f"the weights are {why}: load their numbers, then measure")
    b, c = w_b.double(), w_c.double()
    tiny = torch.finfo(torch.float64).tiny
    inner = float((b * c).sum())
    correlation = inner / max(float(b.norm() * c.norm()), tiny)
    measured = {
        "rate": float(a_log.double().exp().mean()),
        "decay": token_memory(a_log, delta_bias, 1),
        "delta": float(F.softplus(delta_bias.double()).mean()),
        "correlation": correlation,
        "correlation_z": correlation * b.numel() ** 0.5,
        "diagonal": inner / (b.shape[1] * groups),
        "memory_16": token_memory(a_log, delta_bias, 16),
        "memory_64": token_memory(a_log, delta_bias, 64),
    }
    if conv_weight is not None:
        taps = conv_weight.double().flatten(1)
        identity = torch.zeros_like(taps)
        identity[:, -1] = 1
        measured["convolution"] = float((taps - identity).norm() / identity.norm())
    return measured
