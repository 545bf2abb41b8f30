"""What a reading of a state-space mixer must survive before it is written: its own output, against the recurrence.

With u = SiLU(conv(x)), Δ = softplus(...), A = −exp(A_log): h ← exp(Δ A) h + Δ B u and y = C h + D u, step by step in
float64, from the rows that were read and weights drawn at random. Mamba-1 (arXiv 2312.00752) gates y with SiLU(z);
Mamba-2 (2405.21060) also normalises it, in one of a few orders.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.init.layouts.arguments import arguments
from espalier.init.layouts.compare import is_near
from espalier.init.layouts.registry import SSMWeights
from espalier.init.layouts.scratch import Call, first_line, run
from espalier.init.layouts.trial import Unproven

# Logarithms of rates, and biases of steps, that it is run with: those of a usual size show what is made of them; slow
# rates with large steps, as they are written, and small steps show limits that nothing else reaches.
_RANGES = (((-1.0, 1.0), (-1.0, 1.0)), ((-8.0, -4.0), (2.0, 4.0)), ((-1.0, 3.0), (-6.0, -4.0)))


def prove_ssm(module: nn.Module, weights: SSMWeights, call: Call) -> None:
    """Prove that a mixer computes a Mamba's recurrence with the rows that were read.

    Args:
        module: a scratch copy of the layer (``copy_for_probe``), inside ``untraced``.
        weights: views into that copy.
        call: inputs that it runs on; the first are the tokens.

    Raises:
        Unproven: it computes something else.
        CannotRunError: it does not run on these inputs.
    """
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        if parameter.ndim < 2:  # where a copy has 0 and ±1: a bias in another place would not be seen
            parameter.uniform_(-1.0, 1.0, generator=generator)
    tokens = next(iter((*call.args, *call.kwargs.values()))).reshape(call.length, -1)
    kind = weights.family.replace("mamba", "Mamba-")
    for rates, steps in _RANGES:
        weights.a_log.uniform_(*rates, generator=generator)
        weights.delta_bias.uniform_(*steps, generator=generator)
        found = run(module, call)[0].double()
        try:
            outputs = list((_first if weights.family == "mamba1" else _second)(module, weights, tokens))
        except Exception as error:  # the parts are anybody's: missing, of other shapes, called in another way
            raise Unproven(f"its parts do not fit together as those of {kind} do ({first_line(error)})") from error
        same = (wanted for wanted in outputs if found.numel() == wanted.numel())
        if not any(is_near(found.reshape(wanted.shape), wanted) for wanted in same):
            raise Unproven(f"its output is not that of {kind} with the rows that were read")


def _first(module: nn.Module, weights: SSMWeights, x_LD: Tensor) -> Iterator[Tensor]:
    """Yield the output of a Mamba-1."""
    inner_LE, z_LE = module.get_submodule("in_proj")(x_LD).chunk(2, -1)
    u_LE = _convolved(weights, inner_LE)
    rank = weights.w_delta.shape[1]
    low_LR = u_LE @ module.get_submodule("x_proj").get_parameter("weight")[:rank].mT
    delta_LE = F.softplus(low_LR @ weights.w_delta.mT + weights.delta_bias)
    b_LGN, c_LGN = (part[:, None] for part in _maps(weights, u_LE))
    y_LE = _recurrence(u_LE, delta_LE, weights.a_log, b_LGN, c_LGN) + _skip(module, weights) * u_LE
    yield module.get_submodule("out_proj")(y_LE * F.silu(z_LE))


def _second(module: nn.Module, weights: SSMWeights, x_LD: Tensor) -> Iterator[Tensor]:
    """Yield the outputs of a Mamba-2 that gates before its norm, after it, or within."""
    out_proj, norm = module.get_submodule("out_proj"), getattr(module, "norm", None)
    heads, groups, inner = len(weights.a_log), weights.groups, out_proj.get_parameter("weight").shape[1]
    share, states = inner // heads, len(weights.w_b) // groups
    projected = module.get_submodule("in_proj")(x_LD)
    z_LE, mixed_LE = projected[:, :inner], projected[:, inner : 2 * inner]
    mixed_LC = torch.cat([mixed_LE, *_maps(weights, x_LD)], -1)
    u_LE, *both = _convolved(weights, mixed_LC).split([inner, groups * states, groups * states], -1)
    delta_LH = F.softplus(sum(weights.delta_shifts, x_LD @ weights.w_delta.mT + weights.delta_bias))
    delta_LH = delta_LH.clamp(*weights.step_limits)
    b_LGN, c_LGN = (part.unflatten(-1, (groups, states)) for part in both)
    by_head = (delta_LH, weights.a_log, _skip(module, weights))
    delta_LE, a_log_E, d_E = (part.repeat_interleave(share, -1) for part in by_head)
    y_LE = _recurrence(u_LE, delta_LE, a_log_E[:, None], b_LGN, c_LGN) + d_E * u_LE
    if norm is None:
        yield out_proj(y_LE * F.silu(z_LE))
        return
    takes_gate = arguments(norm)[1:]
    if takes_gate:
        yield out_proj(norm(y_LE, z_LE))
    if all(each.default is not each.empty for each in takes_gate):
        yield out_proj(norm(y_LE * F.silu(z_LE)))
        yield out_proj(norm(y_LE) * F.silu(z_LE))


def _skip(module: nn.Module, weights: SSMWeights) -> Tensor:
    """Return D, 0 in a mixer without."""
    skip: Tensor | None = getattr(module, "D", None)
    return torch.zeros_like(weights.delta_bias) if skip is None else skip


def _maps(weights: SSMWeights, inputs: Tensor) -> list[Tensor]:
    """Return B and C."""
    both = [inputs @ weights.w_b.mT, inputs @ weights.w_c.mT]
    if not weights.map_biases:
        return both
    return [part + bias for part, bias in zip(both, torch.cat(weights.map_biases).chunk(2), strict=True)]


def _convolved(weights: SSMWeights, inner_LC: Tensor) -> Tensor:
    """Return SiLU of the causal convolution."""
    taps = weights.conv_weight
    padded_CL = F.pad(inner_LC.mT, (taps.shape[-1] - 1, 0))
    return F.silu(F.conv1d(padded_CL[None], taps, weights.conv_bias, groups=len(taps))[0].mT)


def _recurrence(u_LE: Tensor, delta_LE: Tensor, a_log: Tensor, b_LGN: Tensor, c_LGN: Tensor) -> Tensor:
    share, rows = u_LE.shape[1] // b_LGN.shape[1], []
    state_EN = u_LE.new_zeros(u_LE.shape[1], b_LGN.shape[2])
    for u_E, delta_E, b_GN, c_GN in zip(u_LE, delta_LE, b_LGN, c_LGN, strict=True):
        # One token's at a time: those of 256 tokens would take gigabytes in a large mixer.
        b_EN, c_EN = b_GN.repeat_interleave(share, 0), c_GN.repeat_interleave(share, 0)
        decay_EN = (-a_log.exp() * delta_E[:, None]).exp()
        state_EN = decay_EN * state_EN + (delta_E * u_E)[:, None] * b_EN
        rows.append((state_EN * c_EN).sum(-1))
    return torch.stack(rows)
