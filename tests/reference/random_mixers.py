"""State-space mixers written in many ways, and what their own forward pass shows of what was written into them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DIM, INNER, RANK = 12, 24, 3
# How users spell the parts: the reference implementation's names first.
PARTS = ("in_proj", "conv1d", "x_proj", "dt_proj", "A_log", "D", "dt_bias", "norm", "out_proj")
NAMES = {
    "reference": PARTS,
    "spelled": ("proj_in", "conv", "bc_proj", "delta_proj", "log_A", "skip", "delta_bias", "out_norm", "proj_out"),
    "half": ("in_proj", "conv", "x_proj", "dt_proj", "A_log", "D", "dt_bias", "norm", "out_proj"),
    "layers": ("in_layer", "conv1d", "x_layer", "dt_layer", "A_log", "D", "dt_bias", "norm", "out_layer"),
}
STORAGE = ("fused", "separate")
# Blocks of a Mamba-1's two maps and of a Mamba-2's one, as they are stored.
ORDERS = {
    "mamba1": ("xz dBC", "zx dBC", "xz BCd", "xz dCB", "xz BdC"),
    "mamba2": ("zxBCd", "xzBCd", "zxCBd", "dzxBC", "zxdBC", "xBCdz", "zBCxd"),
}
NORMS = ("", "after", "before", "gated")
STARTS = ("reference", "torch", "zeros", "ones")
LIMITS = {"clamped": (1e-3, 0.1), "clamped high": (0, 2.5), "floored": (1e-4, None), "floored high": (1e-2, None)}
LIMITS["stated limits"] = (0.01, 2.5)  # under the name that libraries give them
STEPS = (*LIMITS, "exponential", "scaled", "unbiased", "shifted", "relu")
RATES = ("growing", "clamped rate", "floored rate", "softplus rate", "complex", "constant rate", "published rate")
RECURRENCES = (
    "exact", "bilinear", "no step on input", "initial state", "state norm", "resets", "shifted read", "interleaved",
)  # fmt: skip
MAPS = ("b for c", "tied", "normalised", "maps of input", "scaled maps", "maps activated")
WAYS = (
    "backwards", "both ways", "summed ways", "ahead", "dilated", "conv residual", "no activation", "relu activation",
    "whole chunks",
)  # fmt: skip
OUTER = ("sigmoid gate", "no gate", "gate before", "residual", "prenorm", "sequence first", "channels first")
TWISTS = (*STEPS, *RATES, *RECURRENCES, *MAPS, *WAYS, *OUTER)


@dataclass(frozen=True)
class Form:
    """How a ``RandomMixer`` is written; a twist makes some of its rows mean something else."""

    family: str = "mamba1"
    names: str = "reference"
    storage: str = "fused"
    order: int = 0
    state: int = 4
    heads: int = 6
    groups: int = 1
    taps: int = 4
    skip: bool = True
    norm: str = ""
    conv_bias: bool = True
    bias: bool = False
    map_bias: bool = False
    step_bias: str = "layer"
    conv_on: str = "all"
    start: str = "reference"
    stated: str = "ngroups"
    twist: str = ""

    @property
    def blocks(self) -> str:
        orders = ORDERS[self.family]
        return orders[self.order % len(orders)]

    def is_reference(self) -> bool:
        """Return whether this is a published mixer under its published names, with or without D: it must be written."""
        usual = (
            self.names == "reference"
            and self.storage == "fused"
            and self.order == 0
            and self.twist in ("", "whole chunks")
        )
        first = not self.norm and not self.map_bias
        second = self.conv_on == "all" and (self.groups == 1 or self.stated != "other")
        return usual and (first if self.family == "mamba1" else second)


class _GatedNorm(nn.RMSNorm):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(x if gate is None else x * F.silu(gate))


class RandomMixer(nn.Module):
    """A mixer of a given form; ``seen`` keeps what its last forward pass worked with, one entry a direction."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form, self.n = form, form.state
        self.is_first = form.family == "mamba1"
        self.heads = INNER if self.is_first else form.heads
        groups = 1 if self.is_first else form.groups
        self.sizes = {"x": INNER, "z": INNER, "B": groups * self.n, "C": groups * self.n}
        self.sizes["d"] = RANK if self.is_first else form.heads
        if not self.is_first:
            setattr(self, {"other": "num_bc"}.get(form.stated, form.stated), groups)
        self.groups_of_maps = torch.Size([groups])  # under no name or type that a layout reads
        name = dict(zip(PARTS, NAMES[form.names], strict=True))
        self.at = name
        outer, _, maps = form.blocks.partition(" ")
        self.layouts = {"in_proj": outer, "x_proj": maps} if maps else {"in_proj": outer}
        for part, layout in self.layouts.items():
            width, bias = (DIM, form.bias) if part == "in_proj" else (INNER, form.map_bias)
            if form.storage == "separate":
                for block in layout:
                    self.add_module(f"{block.replace('d', 'dt')}_map", nn.Linear(width, self.sizes[block], bias))
            else:
                self.add_module(name[part], nn.Linear(width, sum(self.sizes[block] for block in layout), bias))
        self.convolved = "x" if self.is_first or form.conv_on == "x" else "xBC"
        channels = sum(self.sizes[block] for block in self.convolved)
        reach = form.taps - 1
        self.add_module(
            name["conv1d"],
            nn.Conv1d(channels, channels, form.taps, groups=channels, bias=form.conv_bias,
                      padding=2 * reach if form.twist == "dilated" else reach,
                      dilation=2 if form.twist == "dilated" else 1),
        )  # fmt: skip
        if self.is_first:
            self.add_module(name["dt_proj"], nn.Linear(RANK, INNER, form.step_bias == "layer"))
        if not self.is_first or form.step_bias != "layer":
            self.register_parameter(name["dt_bias"], nn.Parameter(torch.zeros(self.heads)))
        rates = torch.arange(1.0, self.n + 1).log().repeat(INNER, 1) if self.is_first else torch.zeros(self.heads)
        self.register_parameter(name["A_log"], nn.Parameter(rates))
        if form.skip:
            self.register_parameter(name["D"], nn.Parameter(torch.ones(self.heads)))
        if form.norm:
            cls = _GatedNorm if form.norm == "gated" else nn.RMSNorm
            self.add_module(name["norm"], cls(INNER, eps=1e-5))
        self.add_module(name["out_proj"], nn.Linear(INNER, DIM, form.bias))
        if form.twist == "stated limits":
            self.dt_limit = LIMITS[form.twist]
        if form.twist == "initial state":
            self.start = nn.Parameter(torch.randn(INNER, self.n))
        if form.twist == "complex":
            self.A_imag = nn.Parameter(torch.arange(1.0, self.n + 1).repeat(INNER, 1))
        if form.twist == "scaled":
            self.register_buffer("factor", torch.tensor(0.5))
        self.chunk = 8 if form.twist == "whole chunks" else 1
        self.seen: list[dict[str, Tensor]] = []
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Draw the untouched start that the form names."""
        bias = self.part("dt_proj").bias if self.is_first and self.form.step_bias == "layer" else self.part("dt_bias")
        if self.form.start == "reference":
            steps = torch.exp(torch.rand(len(bias)) * 4.6 - 6.9)
            bias.copy_(steps + torch.log(-torch.expm1(-steps)))
            if not self.is_first:
                self.part("A_log").uniform_(1, 16).log_()
        elif self.form.start != "torch":
            bias.fill_(float(self.form.start == "ones"))

    def part(self, name: str) -> Any:
        """Return the module or parameter that the reference calls ``name``."""
        return getattr(self, self.at[name])

    def rows(self, part: str, x: Tensor) -> dict[str, Tensor]:
        """Return the blocks of a map by what they are."""
        layout = self.layouts[part]
        if self.form.storage == "separate":
            return {block: getattr(self, f"{block.replace('d', 'dt')}_map")(x) for block in layout}
        split = self.part(part)(x).split([self.sizes[block] for block in layout], -1)
        return dict(zip(layout, split, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        twist, self.seen = self.form.twist, []
        if twist == "sequence first":
            return self.mix(x.transpose(0, 1)).transpose(0, 1)
        if twist == "channels first":
            return self.mix(x.mT).mT
        if twist == "backwards":
            return self.mix(x.flip(1)).flip(1)
        if twist == "both ways":
            return self.mix(x) + self.mix(x.flip(1)).flip(1)
        if twist == "summed ways":
            return (self.mix(x) + self.mix(x.flip(1))) / 2
        y = self.mix(F.rms_norm(x, x.shape[-1:]) * 0.5 if twist == "prenorm" else x)
        return y + x if twist == "residual" else y

    def mix(self, x: Tensor) -> Tensor:
        """Return the layer's output of a sequence (B, L, d) in the order in which it is given."""
        form, twist = self.form, self.form.twist
        if x.shape[1] % self.chunk:
            raise ValueError(f"{x.shape[1]} tokens are no whole chunks")
        parts = self.rows("in_proj", x)
        z = parts["z"]
        if twist == "gate before":
            parts["x"] = parts["x"] * F.silu(z)
        before = torch.cat([parts[block] for block in self.convolved], -1)
        after = self.convolve(before)
        mixed = {"relu activation": F.relu, "no activation": nn.Identity()}.get(twist, F.silu)(after)
        parts |= dict(zip(self.convolved, mixed.split([self.sizes[b] for b in self.convolved], -1), strict=True))
        u, maps = parts["x"], parts
        if self.is_first:
            maps = self.rows("x_proj", before if twist == "maps of input" else u)
        raw = maps if self.is_first or form.conv_on == "x" else dict(
            zip(self.convolved, before.split([self.sizes[b] for b in self.convolved], -1), strict=True)
        )  # fmt: skip
        b, c = self.read_maps(maps["B"], maps["C"])
        gain = self.step(maps["d"])
        y = self.recur(u, gain, b, c)
        self.seen[-1] |= {"before": before, "after": after, "raw_b": raw["B"], "raw_c": raw["C"]}
        if form.skip:
            y = y + self.part("D").repeat_interleave(INNER // self.heads) * u
        out: Tensor = self.part("out_proj")(self.gated(y, z))
        return out

    def convolve(self, x: Tensor) -> Tensor:
        """Return the short convolution's result."""
        reach, length = self.form.taps - 1, x.shape[1]
        out = self.part("conv1d")(x.mT)
        out = out[..., reach : reach + length] if self.form.twist == "ahead" else out[..., :length]
        return out.mT + x if self.form.twist == "conv residual" else out.mT

    def read_maps(self, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is written with and what is read with, (B, L, G·N)."""
        twist = self.form.twist
        if twist == "b for c":
            return c, b
        if twist == "tied":
            return b, b
        if twist == "normalised":
            return F.rms_norm(b, b.shape[-1:]), F.rms_norm(c, c.shape[-1:])
        if twist == "scaled maps":
            return b * self.n**-0.5, c
        return (b.tanh(), c.tanh()) if twist == "maps activated" else (b, c)

    def step(self, low: Tensor) -> Tensor:
        """Return the step sizes, (B, L, channels)."""
        twist = self.form.twist
        if self.is_first and twist == "unbiased":
            low = low @ self.part("dt_proj").weight.mT
        elif self.is_first:
            low = self.part("dt_proj")(low)
        own = not self.is_first or self.form.step_bias != "layer"
        if own and twist not in ("unbiased", "shifted"):
            low = low + self.part("dt_bias")
        step = {"exponential": torch.exp, "relu": F.relu}.get(twist, F.softplus)(low)
        if twist == "shifted":
            step = step + (self.part("dt_bias") if own else self.part("dt_proj").bias)
        step = step * self.factor if twist == "scaled" else step
        step = step.clamp(*LIMITS[twist]) if twist in LIMITS else step
        return step.repeat_interleave(INNER // self.heads, -1)

    def rates(self) -> Tensor:
        """Return A as (E, N)."""
        twist, a_log = self.form.twist, self.part("A_log")
        if not self.is_first:
            a_log = a_log.repeat_interleave(INNER // self.heads)[:, None].expand(-1, self.n)
        if twist == "growing":
            return a_log.exp()
        if twist == "clamped rate":
            return -a_log.clamp(-2.0, 2.0).exp()
        if twist == "floored rate":
            return -a_log.exp() - 0.2
        if twist == "softplus rate":
            return -F.softplus(a_log)
        if twist == "complex":
            return torch.complex(-a_log.exp(), self.A_imag)
        if twist == "constant rate":
            return torch.full_like(a_log, -1.0)
        return -(8 * a_log).exp() if twist == "published rate" else -a_log.exp()

    def recur(self, u: Tensor, gain: Tensor, b: Tensor, c: Tensor) -> Tensor:
        """Return the recurrence's output of (B, L, E) and keep what it was computed from."""
        twist, groups = self.form.twist, self.groups_of_maps[0]
        b, c = (part.unflatten(-1, (groups, self.n)).repeat_interleave(INNER // groups, -2) for part in (b, c))
        if twist == "interleaved" and not self.is_first:
            u = u.unflatten(-1, (-1, self.heads)).mT.flatten(-2)
        rates = self.rates()
        decay = (gain[..., None] * rates).exp()
        write = torch.ones_like(gain)[..., None] if twist == "no step on input" else gain[..., None]
        if twist == "exact":
            write = (decay - 1) / rates
        elif twist == "bilinear":
            half = gain[..., None] * rates / 2
            decay, write = (1 + half) / (1 - half), gain[..., None] / (1 - half)
        state = b.new_zeros(len(u), INNER, self.n).to(decay.dtype)
        state = state + self.start if twist == "initial state" else state
        rows = []
        for t in range(u.shape[1]):
            old = state
            if twist == "resets" and t % 4 == 3:
                state = torch.zeros_like(state)
            state = decay[:, t] * state + (write * b)[:, t] * u[:, t, :, None]
            if twist == "state norm":
                state = F.rms_norm(state, state.shape[-1:])
            rows.append(((old if twist == "shifted read" else state) * c[:, t]).sum(-1))
        y = torch.stack(rows, 1)
        y = y.real if y.is_complex() else y
        self.seen.append({"u": u, "b": b, "c": c, "y": y})
        return y

    def gated(self, y: Tensor, z: Tensor) -> Tensor:
        """Return the output of the recurrence, gated and normalised in the form's order."""
        form, twist = self.form, self.form.twist
        gate = torch.ones_like(z) if twist in ("no gate", "gate before") else F.silu(z)
        gate = z.sigmoid() if twist == "sigmoid gate" else gate
        if not form.norm:
            return y * gate
        norm = self.part("norm")
        if form.norm == "gated" and twist not in ("no gate", "gate before", "sigmoid gate"):
            return norm(y, z)
        return norm(y) * gate if form.norm == "before" else norm(y * gate)


@torch.no_grad()
def faults(module: RandomMixer, decay: float, delta: float, rho: float, length: int = 24) -> list[str]:
    """Return which parts of what was asked the forward pass of a float64 module does not show.

    Steps are asked to be independent of the input (``delta_weight=0``), the convolution to be the identity, ρ to be ±1.
    Then y_t = Σ_{s≤t} Δ exp(−(t − s) Δ exp(−c)) (C_t·B_s) u_s, and W_C x = ρ W_B x.
    """
    generator = torch.Generator().manual_seed(4)
    x_LD = torch.randn(length, DIM, dtype=torch.float64, generator=generator)
    shape = (length, 1, DIM) if module.form.twist == "sequence first" else (1, length, DIM)
    given = x_LD.T[None] if module.form.twist == "channels first" else x_LD.reshape(shape)
    out = module(given)
    found, sign = [], 1 if rho >= 0 else -1
    lag = torch.arange(length)[:, None] - torch.arange(length)
    kept = (-lag.clamp_min(0).double() * delta * torch.tensor(-decay).double().exp()).exp() * (lag >= 0)
    for seen in module.seen:
        u, b, c, y = (seen[name][0] for name in ("u", "b", "c", "y"))
        wanted = torch.einsum("ts,ten,sen,se->te", delta * kept, c, b, u)
        found += ["recurrence"] if _off(y, wanted) > 4e-2 else []  # 4 %: a step's bias of −9 in bfloat16
        found += ["maps"] if _off(seen["raw_c"], sign * seen["raw_b"]) > 1e-2 else []
        found += ["convolution"] if _off(seen["after"], seen["before"]) > 1e-9 else []
        if module.is_first or sign > 0:
            found += ["maps"] if _off(c, sign * b) > 1e-2 else []
    changed = x_LD.clone()
    changed[length // 2] += 1.0
    other = module(changed.T[None] if module.form.twist == "channels first" else changed.reshape(shape))
    a, b = (each.mT if module.form.twist == "channels first" else each for each in (out, other))
    moved = (a - b).abs().reshape(length, -1).amax(1) > 1e-12
    return sorted({*found, *(["causality"] if bool(moved[: length // 2].any()) else [])})


def _off(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
