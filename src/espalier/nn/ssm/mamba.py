"""Mamba-1 and Mamba-2 mixers with the parameter names and layouts of the reference implementation."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.errors import EspalierError
from espalier.nn.plain import is_plain
from espalier.nn.precision import no_autocast, upcast
from espalier.nn.ssm.causal_conv import causal_conv_silu
from espalier.nn.ssm.gated_norm import GatedRMSNorm
from espalier.nn.ssm.optional_inputs import check_devices, check_shapes
from espalier.nn.ssm.selective_scan import selective_scan, selective_step
from espalier.nn.ssm.split_linear import split_linear
from espalier.nn.ssm.ssd import ssd, ssd_step
from espalier.sizes import whole_number, whole_numbers


class MambaState(NamedTuple):
    """What a mixer remembers between calls: the convolution's last K − 1 inputs, and the recurrent state."""

    conv_BKC: Tensor
    scan: Tensor


class _Mixer(nn.Module):
    """What both mixers share: the way of a sequence through the convolution and the recurrence."""

    dim: int
    conv_size: int
    conv_dim: int
    state_shape: tuple[int, ...]
    other: tuple[str, str]
    """A parameter that only the other kind of mixer has, and what to say where a checkpoint has it."""
    conv1d: nn.Conv1d
    out_proj: nn.Linear
    A_log: nn.Parameter

    def forward(
        self, x_BLD: Tensor, *, mask: Tensor | None = None, state: MambaState | None = None, return_state: bool = False
    ) -> Tensor | tuple[Tensor, MambaState]:
        """Mix a sequence.

        Args:
            x_BLD: inputs, (batch, length, D).
            mask: (B, L), true at real tokens; padding, on either side, changes nothing and gives 0. Where a state is
                given, padding comes after the tokens: the convolution's window takes in what it is given.
            state: what earlier calls left; the sequence's start if none is given.
            return_state: also return the state after the last real token.

        Raises:
            EspalierError: an input, a mask or a state that does not fit.
        """
        if x_BLD.ndim != 3 or x_BLD.shape[2] != self.dim or not x_BLD.numel():
            raise EspalierError(
                f"the input is {tuple(x_BLD.shape)}: give (batch, length, {self.dim}), neither of them 0"
            )
        check_shapes(mask=(mask, x_BLD.shape[:2]))
        if state is not None:
            self._check_state(x_BLD, state)
        if mask is not None:  # whatever stands there: 0 times it may be no 0
            x_BLD = torch.where(mask.bool()[..., None], x_BLD, 0.0)
        inner_BLC, *others = self._project(x_BLD)
        if mask is not None:  # a projection may add something
            inner_BLC = torch.where(mask.bool()[..., None], inner_BLC, 0.0)
        history, start = state or (None, None)
        u_BLC = conv_silu(self.conv1d, inner_BLC, history)
        y_BLE, scan = self._recur(u_BLC, *others, initial_state=start, mask=mask, return_state=return_state)
        out_BLD = self.out_proj(y_BLE)
        if scan is None:
            return out_BLD
        return out_BLD, MambaState(_last_inputs(inner_BLC, history, mask, self.conv_size), scan)

    def step(self, x_BD: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        """Mix one token and return (output, the state after it).

        Args:
            x_BD: one token of every sequence, (batch, D).
            state: what earlier calls left; ``empty_state`` before the first.

        Raises:
            EspalierError: an input or a state that does not fit.
        """
        if x_BD.ndim != 2 or x_BD.shape[1] != self.dim:
            raise EspalierError(f"the input is {tuple(x_BD.shape)}: give (batch, {self.dim})")
        self._check_state(x_BD, state)
        return self._step(x_BD, state)

    def _check_state(self, x: Tensor, state: MambaState) -> None:
        """Refuse a state that is not this mixer's beside the input: one of a single sequence would be broadcast."""
        batch = x.shape[0]
        kinds = [type(part).__name__ for part in state] if isinstance(state, MambaState) else [type(state).__name__]
        if not isinstance(state, MambaState) or not all(isinstance(part, Tensor) for part in state):
            raise EspalierError(f"state is {', '.join(kinds)}: give a MambaState, such as empty_state({batch})")
        if state.conv_BKC.ndim and len(state.conv_BKC) != batch:
            raise EspalierError(f"the state is for {len(state.conv_BKC)} sequences: give {batch}, or no state")
        check_shapes(**{"the state's window": (state.conv_BKC, (batch, self.conv_size - 1, self.conv_dim))})
        check_shapes(**{"the state's recurrent part": (state.scan, (batch, *self.state_shape))})
        check_devices(x, *state)

    def empty_state(self, batch: int) -> MambaState:
        """Return the state before the first token.

        Raises:
            EspalierError: a batch that is no whole number from 0.
        """
        batch = whole_number("batch", batch, least=0)
        history = self.A_log.new_zeros(batch, self.conv_size - 1, self.conv_dim)
        return MambaState(history, upcast(self.A_log.new_zeros(batch, *self.state_shape))[0])

    def _step(self, x_BD: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        """Mix one token by a state that fits."""
        raise NotImplementedError

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return what is convolved, and what else the input is projected to."""
        raise NotImplementedError

    def _recur(self, u_BLC: Tensor, *others: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        """Return the recurrence's gated output and, if it is asked for, the state after it."""
        raise NotImplementedError

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        name, remedy = self.other
        if f"{prefix}{name}" in state_dict:
            mixer = repr(prefix.rstrip(".")) if prefix else "the mixer"
            raise EspalierError(f"{mixer} of the checkpoint is {remedy} blocks")
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Mamba1(_Mixer):
    """Mamba-1 mixer: ``out_proj(scan(SiLU(conv(x))) · SiLU(z))`` with (x, z) = in_proj(input).

    Parameters bear the names and shapes of mamba_ssm's ``Mamba`` and transformers' ``MambaMixer``, whose ``state_dict``
    loads as it is.

    Args:
        dim: width D of the input and output.
        state_size: N, numbers kept per channel.
        expand: inner width E over D.
        conv_size: taps of the causal convolution.
        dt_rank: rank of the step sizes' projection; D/16, rounded up, if none is given.
        generator: source of the initial weights.

    Raises:
        EspalierError: a size that is no whole number from 1.

    Source: arXiv 2312.00752, section 3.4.
    """

    other = "dt_bias", "Mamba-2: load it into a model of Mamba2"

    def __init__(
        self,
        dim: int,
        state_size: int = 16,
        *,
        expand: int = 2,
        conv_size: int = 4,
        dt_rank: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        dim, state_size, expand, conv_size = whole_numbers(
            dim=dim, state_size=state_size, expand=expand, conv_size=conv_size
        )
        self.dt_rank = math.ceil(dim / 16) if dt_rank is None else whole_number("dt_rank", dt_rank)
        self.dim, self.state_size, self.inner = dim, state_size, expand * dim
        self.in_proj = nn.Linear(dim, 2 * self.inner, bias=False)
        self.conv_size, self.conv_dim, self.state_shape = conv_size, self.inner, (self.inner, state_size)
        self.conv1d = nn.Conv1d(self.inner, self.inner, conv_size, groups=self.inner, padding=conv_size - 1)
        self.x_proj = nn.Linear(self.inner, self.dt_rank + 2 * state_size, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.inner)
        self.A_log = nn.Parameter(torch.empty(self.inner, state_size))
        self.D = nn.Parameter(torch.empty(self.inner))
        self.out_proj = nn.Linear(self.inner, dim, bias=False)
        self.init_weights(generator)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw the reference implementation's initial weights.

        ========================== ==========================================================
        linear maps, convolution   uniform on ±1/√fan-in (torch's default)
        ``dt_proj.weight``         uniform on ±1/√dt_rank
        ``dt_proj.bias``           softplus⁻¹ of a step log-uniform on [0.001, 0.1]
        ``A_log``                  log(1), …, log(N) in every channel
        ``D``                      1
        ========================== ==========================================================
        """
        for layer in (self.in_proj, self.conv1d, self.x_proj, self.out_proj):
            _reset(layer, generator)
        bound = self.dt_rank**-0.5
        self.dt_proj.weight.uniform_(-bound, bound, generator=generator)
        _draw_step_bias(self.dt_proj.bias, generator)
        self.A_log.copy_(torch.arange(1, self.state_size + 1, device=self.A_log.device).log().expand_as(self.A_log))
        self.D.fill_(1)

    def _step(self, x_BD: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        inner_BE, z_BE = self.in_proj(x_BD).chunk(2, dim=-1)
        u_BE, conv = _conv_step(self.conv1d, inner_BE, state.conv_BKC)
        delta_BE, b_BN, c_BN = self.coefficients(u_BE)
        y_BE, scan = selective_step(u_BE, delta_BE, _rates(self.A_log), b_BN, c_BN, self.D, state.scan)
        return self.out_proj(y_BE * F.silu(z_BE)), MambaState(conv, scan)

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        return split_linear(self.in_proj, x, (self.inner, self.inner))

    def _recur(self, u_BLC: Tensor, *others: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        delta, bias, b, c = self._maps(u_BLC)
        steps: dict[str, Any] = {"delta_bias_E": bias, "delta_softplus": True}
        result = selective_scan(u_BLC, delta, _rates(self.A_log), b, c, self.D, **steps, gate_BLE=others[0], **options)
        return result if isinstance(result, tuple) else (result, None)

    def coefficients(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (Δ, B, C) of the convolved inputs (..., E), Δ in float32 or better."""
        logits, bias, b, c = self._maps(u)
        return F.softplus(logits if bias is None else logits + bias), b, c

    def _maps(self, u: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Return (softplus⁻¹(Δ) less its bias, that bias, B, C) of the convolved inputs."""
        rank, b, c = self.x_proj(u).split([self.dt_rank, self.state_size, self.state_size], dim=-1)
        with no_autocast(u.device):  # small steps would round away
            if not is_plain(self.dt_proj, nn.Linear):  # whatever it is: an adapter, a quantised layer
                floats = (p.dtype for p in self.dt_proj.parameters() if p.is_floating_point())
                return upcast(self.dt_proj(rank.to(next(floats, self.A_log.dtype))))[0], None, b, c
            rank, weight, bias = upcast(rank, self.dt_proj.weight, self.dt_proj.bias)
            return F.linear(rank, weight), bias, b, c


class Mamba2(_Mixer):
    """Mamba-2 mixer: ``out_proj(norm(ssd(x, Δ, B, C), z))`` with (z, xBC, Δ) = in_proj(input), xBC convolved.

    Parameters bear the names and shapes of mamba_ssm's ``Mamba2`` and transformers' ``Mamba2Mixer``, whose
    ``state_dict`` loads as it is.

    Args:
        dim: width D of the input and output.
        state_size: N, numbers kept per channel.
        head_dim: channels that share one decay.
        expand: inner width over D.
        conv_size: taps of the causal convolution.
        groups: how many B and C there are for all heads.
        chunk_size: tokens per chunk of the parallel form; changes speed, not results.
        generator: source of the initial weights.

    Raises:
        EspalierError: a size that is no whole number from 1, or heads that do not divide evenly.

    Source: arXiv 2405.21060, section 7.
    """

    other = "x_proj.weight", "Mamba-1: load it into a model of Mamba1"

    def __init__(
        self,
        dim: int,
        state_size: int = 64,
        *,
        head_dim: int = 64,
        expand: int = 2,
        conv_size: int = 4,
        groups: int = 1,
        chunk_size: int = 64,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        dim, state_size, head_dim, expand = whole_numbers(
            dim=dim, state_size=state_size, head_dim=head_dim, expand=expand
        )
        conv_size, groups, chunk_size = whole_numbers(conv_size=conv_size, groups=groups, chunk_size=chunk_size)
        self.dim, self.state_size, self.inner, self.head_dim = dim, state_size, expand * dim, head_dim
        if self.inner % head_dim:
            raise EspalierError(f"head_dim {head_dim} does not divide expand·dim = {self.inner}: choose a divisor")
        self.num_heads, self.groups, self.chunk_size = self.inner // head_dim, groups, chunk_size
        if self.num_heads % groups:
            raise EspalierError(f"groups {groups} does not divide the {self.num_heads} heads: choose a divisor")
        self.conv_dim = self.inner + 2 * groups * state_size
        self.in_proj = nn.Linear(dim, self.inner + self.conv_dim + self.num_heads, bias=False)
        self.conv_size, self.state_shape = conv_size, (self.num_heads, state_size, head_dim)
        self.conv1d = nn.Conv1d(self.conv_dim, self.conv_dim, conv_size, groups=self.conv_dim, padding=conv_size - 1)
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.D = nn.Parameter(torch.empty(self.num_heads))
        self.norm = GatedRMSNorm(self.inner, groups)
        self.out_proj = nn.Linear(self.inner, dim, bias=False)
        self.init_weights(generator)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw the reference implementation's initial weights.

        ========================== ==========================================================
        linear maps, convolution   uniform on ±1/√fan-in (torch's default)
        ``dt_bias``                softplus⁻¹ of a step log-uniform on [0.001, 0.1]
        ``A_log``                  log of a rate uniform on [1, 16]
        ``D``, ``norm.weight``     1
        ========================== ==========================================================
        """
        for layer in (self.in_proj, self.conv1d, self.out_proj):
            _reset(layer, generator)
        _draw_step_bias(self.dt_bias, generator)
        self.A_log.uniform_(1, 16, generator=generator).log_()
        self.D.fill_(1)
        self.norm.weight.fill_(1)

    def _step(self, x_BD: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        inner_BC, z_BE, delta_BH = self._project(x_BD)
        u_BC, conv = _conv_step(self.conv1d, inner_BC, state.conv_BKC)
        x_BHP, b_BGN, c_BGN = self._maps(u_BC)
        delta_BH = step_sizes(delta_BH, self.dt_bias)
        y_BHP, scan = ssd_step(x_BHP, delta_BH, _rates(self.A_log), b_BGN, c_BGN, self.D, state.scan)
        return self.out_proj(self.norm(y_BHP.flatten(-2), z_BE)), MambaState(conv, scan)

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        z, inner, logits = split_linear(self.in_proj, x, (self.inner, self.conv_dim, self.num_heads))
        return inner, z, logits

    def _recur(self, u_BLC: Tensor, *others: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        z, logits = others
        x, b, c = self._maps(u_BLC)
        delta = step_sizes(logits, self.dt_bias)
        result = ssd(x, delta, _rates(self.A_log), b, c, self.D, chunk_size=self.chunk_size, **options)
        y, scan = result if isinstance(result, tuple) else (result, None)
        return self.norm(y.flatten(-2), z), scan

    def _maps(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (x per head, B, C) of the convolved inputs."""
        share = self.groups * self.state_size
        x, b, c = u.split([self.inner, share, share], dim=-1)
        maps = (m.unflatten(-1, (self.groups, self.state_size)) for m in (b, c))
        return (x.unflatten(-1, (self.num_heads, self.head_dim)), *maps)


def _rates(log_rates: Tensor) -> Tensor:
    """Return A = −exp(A_log) in float32 or better."""
    return -upcast(log_rates)[0].exp()


def step_sizes(projected: Tensor, bias: Tensor) -> Tensor:
    """Return Δ = softplus(projection + bias) in float32 or better: bfloat16 would round small steps away."""
    projected, bias = upcast(projected, bias)
    return F.softplus(projected + bias)


def _reset(layer: nn.Linear | nn.Conv1d, generator: torch.Generator | None) -> None:
    bound = layer.weight[0].numel() ** -0.5
    for parameter in layer.parameters():
        parameter.uniform_(-bound, bound, generator=generator)


def _draw_step_bias(bias: Tensor, generator: torch.Generator | None) -> None:
    """Fill with softplus⁻¹(Δ), Δ log-uniform on [0.001, 0.1]."""
    low, high = math.log(1e-3), math.log(1e-1)
    step = bias.uniform_(low, high, generator=generator).exp()
    bias.copy_(step + torch.log(-torch.expm1(-step)))


def _last_inputs(inputs_BLC: Tensor, history: Tensor | None, mask_BL: Tensor | None, taps: int) -> Tensor:
    """Return the convolution's inputs at the last K − 1 places up to the last real token of each row."""
    if history is None:
        padded = F.pad(inputs_BLC, (0, 0, taps - 1, 0))
    else:
        padded = torch.cat([history.to(inputs_BLC.dtype), inputs_BLC], dim=1)
    if mask_BL is None:
        return padded[:, padded.shape[1] - (taps - 1) :]
    places = torch.arange(1, mask_BL.shape[1] + 1, device=mask_BL.device)
    seen_B = (places * mask_BL.bool()).amax(1)
    index_BK = seen_B[:, None] + torch.arange(taps - 1, device=mask_BL.device)
    return padded.gather(1, index_BK[..., None].expand(-1, -1, padded.shape[2]))


def conv_silu(conv: nn.Module, x_BLC: Tensor, history_BKC: Tensor | None) -> Tensor:
    """Return the causal convolution with SiLU, by calling the layer where more than its weights take part."""
    if is_plain(conv, nn.Conv1d):
        return causal_conv_silu(x_BLC, conv.weight.squeeze(1), conv.bias, history=history_BKC)
    before = 0 if history_BKC is None else history_BKC.shape[1]
    x_BLC = x_BLC if history_BKC is None else torch.cat([history_BKC.to(x_BLC.dtype), x_BLC], dim=1)
    mixed_BCL: Tensor = conv(x_BLC.mT)
    return F.silu(mixed_BCL[..., before : x_BLC.shape[1]].mT)


def _conv_step(conv: nn.Module, inputs_BC: Tensor, history_BKC: Tensor) -> tuple[Tensor, Tensor]:
    window_BKC = torch.cat([history_BKC.to(inputs_BC.dtype), inputs_BC[:, None]], dim=1)
    if not is_plain(conv, nn.Conv1d):
        return conv_silu(conv, inputs_BC[:, None], history_BKC)[:, 0], window_BKC[:, 1:]
    window, weight_CK, bias_C = upcast(window_BKC, conv.weight.squeeze(1), conv.bias)
    mixed_BC = (window * weight_CK.mT).sum(1)
    if bias_C is not None:
        mixed_BC = mixed_BC + bias_C
    return F.silu(mixed_BC).to(inputs_BC.dtype), window_BKC[:, 1:]
