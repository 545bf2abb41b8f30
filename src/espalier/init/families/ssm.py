"""The family of state-space layers: each part of the structure written, measured and judged on its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor
from torch.nn import functional as F

from espalier.errors import EspalierError
from espalier.init.families.base import Family, Place
from espalier.init.layouts import SSMWeights
from espalier.init.ssm import MimeticSSM, inverse_softplus, measure_ssm, mimetic_ssm_

# Scores reach 1 at these figures. The reference's random start is far from each: its rates are at least 1, its steps at
# most 0.1, its taps 1.15 from a delta; W_B and W_C are independent, and then the standard score has deviation 1.
_RATE, _STEP, _TAPS, _Z = 0.5, 0.3, 0.5, 8.0
# Outside of these a layer cannot work: it forgets all at every step, or its gradient is zero in float32. The smallest
# A_log that is ever written is −20, the reference's are log 1 … log 16.
_LOG_RATES = (-25.0, 10.0)
_STEPS = (-40.0, 100.0)


@dataclass(frozen=True)
class SSMFit:
    """What one state-space layer is near to; ``MimeticSSM`` says what the parts are.

    Attributes:
        layer: its name.
        family: ``"mamba1"`` or ``"mamba2"``.
        decay: c of ``−A = exp(−c)``: minus the mean of ``A_log``; negative where states forget fast.
        abar: the mean of Ā at zero input.
        delta: the mean of Δ at zero input.
        correlate: the cosine of W_C and W_B.
        convolution: the distance of the taps from the identity over the identity's norm.
    """

    layer: str
    family: str
    decay: float
    abar: float
    delta: float
    correlate: float
    convolution: float

    def __str__(self) -> str:
        return (
            f"{self.layer or '(model)'}: {self.family}, Ā {self.abar:.4g}, Δ {self.delta:.3g}, "
            f"A -exp({-self.decay:+.3g}), W_C·W_B correlated {self.correlate:+.3f}, "
            f"convolution {self.convolution:.2f} from the identity"
        )


class SSMFamily(Family):
    """State-space mixers (Mamba-1, Mamba-2), which start as causal linear attention."""

    kind = "ssm"
    default = MimeticSSM()
    row = SSMFit
    # Libraries leave the step's bias at 0 (a step of 0.69), at 1 (1.31), or as torch draws that of a linear map.
    unspecific = frozenset({"delta"})

    def selects(self, spec: MimeticSSM, place: Place) -> bool:
        """Return whether the spec's ``layers`` name this one."""
        return spec.selects(*place)

    def write(self, weights: SSMWeights, spec: MimeticSSM, place: Place, generator: torch.Generator) -> str:
        """Write the spec's parts, and zero what else would shift them."""
        low, high = weights.step_limits
        if spec.delta is not None and not low <= spec.delta <= high:
            raise EspalierError(
                f"delta is {spec.delta:g}, and its steps are held within {low:g}…{high:g}: give one of those"
            )
        mimetic_ssm_(
            weights.w_b, weights.w_c, weights.a_log, weights.delta_bias, w_delta=weights.w_delta,
            conv_weight=weights.conv_weight, conv_bias=weights.conv_bias, groups=weights.groups,
            generator=generator, **spec.parts,
        )  # fmt: skip
        for bias in weights.map_biases if spec.correlate is not None else ():
            bias.zero_()
        for bias in weights.delta_shifts if spec.delta is not None else ():
            bias.zero_()
        return spec.describe()

    def measure(self, weights: SSMWeights) -> dict[str, float]:
        """Return the figures of ``measure_ssm``."""
        return measure_ssm(
            weights.w_b, weights.w_c, weights.a_log, _steps(weights), weights.conv_weight, weights.groups
        )  # fmt: skip

    def verify(self, weights: SSMWeights, spec: MimeticSSM, place: Place, measured: Mapping[str, float]) -> str:
        """Hold Δ, the correlation and the identity convolution against what was asked."""
        rho = 0.0 if spec.correlate is None else spec.correlate
        bias = 0.0 if spec.delta is None else inverse_softplus(spec.delta)
        # A small step's bias, rounded to bfloat16, is that of another step.
        delta = float(F.softplus(torch.tensor(bias, dtype=weights.delta_bias.dtype, device="cpu").double()))
        for name, asked, slack in (
            # Slack: rounding; the scatter of a sum of N·D independent products.
            ("delta", None if spec.delta is None else delta, 1e-3 * delta),
            ("correlation", spec.correlate, 0.01 + 6 * (1 - rho**2) / weights.w_b.numel() ** 0.5),
            ("convolution", 0.0 if spec.convolution is True else None, 0.0),
        ):
            if asked is not None and not abs(measured[name] - asked) <= slack:
                return f"{name} is {measured[name]:.3g} where {asked:.3g} was written"
        return ""

    def scores(self, measured: Mapping[str, float]) -> dict[str, float]:
        """Return the score of each part that ``MimeticSSM`` names."""
        return {
            # From the reference's rate of 1 down: half a score is half of the way.
            "decay": max(1 - measured["rate"], 0.0) / (1 - _RATE),
            "delta": measured["delta"] / _STEP,
            "correlate": measured["correlation_z"] / _Z,
            "convolution": max(1 - measured.get("convolution", 1.0), 0.0) / (1 - _TAPS),
        }

    def damage(self, weights: SSMWeights, sums: Mapping[str, float]) -> str:
        """Name rates and steps with which a state keeps or gives nothing, and ones that nobody has initialised."""
        if found := super().damage(weights, sums):
            return found
        for name, values, (low, high) in (
            ("A_log", weights.a_log, _LOG_RATES), ("the step's bias", _steps(weights), _STEPS)
        ):  # fmt: skip
            least, most = (float(end) for end in values.double().aminmax())
            if not low <= least <= most <= high:
                return (
                    f"{name} reaches from {least:.3g} to {most:.3g}: outside of {low:g}…{high:g} the layer cannot learn"
                )
        if not weights.a_log.any() and not weights.delta_bias.any():
            return "A_log and the step's bias are 0 everywhere: they were never initialised"
        if not weights.w_b.any() and not weights.w_c.any():
            return "W_B and W_C are 0 everywhere: nothing of their product can be learned"
        return ""

    def fit(self, name: str, weights: SSMWeights) -> SSMFit:
        """Return the fit of one layer."""
        measured = self.measure(weights)
        decay = -float(weights.a_log.double().mean())
        parts = (measured[key] for key in ("decay", "delta", "correlation", "convolution"))
        return SSMFit(name, weights.family, decay, *parts)

    def spec(self, rows: Sequence[SSMFit]) -> MimeticSSM | None:
        """Return the spec of the mean layer; parts that are not there (fast decay, far taps) are left alone."""
        if not rows:
            return None
        figures = [(row.decay, row.delta, row.correlate, row.convolution) for row in rows]
        decay, delta, correlate, distance = map(fmean, zip(*figures, strict=True))
        return MimeticSSM(
            decay=decay if decay > 0 else None,
            delta=delta,
            correlate=min(max(correlate, -1.0), 1.0),
            convolution=distance < _TAPS,
        )

    def lines(self, rows: Sequence[SSMFit]) -> list[str]:
        """Return a line a layer, and what to ask for."""
        spec = self.spec(rows)
        return [*map(str, rows), *([] if spec is None else [f"ask for {spec.describe()}"])]


def _steps(weights: SSMWeights) -> Tensor:
    """Return softplus⁻¹ of the steps at zero input, within the layer's limits."""
    low, high = torch.tensor(weights.step_limits, dtype=torch.float64, device="cpu").expm1().log().tolist()
    return sum(weights.delta_shifts, weights.delta_bias).double().clamp(low, high)
