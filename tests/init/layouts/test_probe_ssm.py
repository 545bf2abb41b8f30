"""The probe of state-space mixers: code of anybody's that computes a Mamba is written, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import espalier
from espalier.errors import EspalierError
from espalier.init.layouts import Skipped, find_layers
from espalier.nn import Mamba1, Mamba2

DIM, INNER, STATE, RANK, TAPS, HEADS = 12, 24, 4, 3, 4, 6


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class OwnMamba1(nn.Module):
    """A Mamba-1 of a user's own, written as the paper's formula, or something else in one place."""

    def __init__(self, twist: str = "") -> None:
        super().__init__()
        self.twist = twist
        self.in_proj, self.out_proj = nn.Linear(DIM, 2 * INNER, bias=False), nn.Linear(INNER, DIM, bias=False)
        self.conv1d = nn.Conv1d(INNER, INNER, TAPS, groups=INNER, padding=TAPS - 1)
        self.x_proj, self.dt_proj = nn.Linear(INNER, RANK + 2 * STATE, bias=False), nn.Linear(RANK, INNER)
        self.A_log = nn.Parameter(torch.arange(1.0, STATE + 1).log().repeat(INNER, 1))
        self.D = nn.Parameter(torch.ones(INNER))

    def forward(self, x: Tensor) -> Tensor:
        length, twist = x.shape[1], self.twist
        x = x.flip(1) if twist == "backwards" else x
        u, z = self.in_proj(x).chunk(2, -1)
        if twist == "exchanged":
            u, z = z, u
        mixed = self.conv1d(u.mT)[..., TAPS - 1 :] if twist == "ahead" else self.conv1d(u.mT)[..., :length]
        u = F.relu(mixed.mT) if twist == "relu" else F.silu(mixed.mT)
        maps = self.x_proj(u)
        sizes = [STATE, STATE, RANK] if twist == "step last" else [RANK, STATE, STATE]
        step, b, c = sorted(maps.split(sizes, -1), key=lambda part: part.shape[-1] != RANK)
        if twist == "b for c":
            b, c = c, b
        step = self.dt_proj(step)
        step = step.exp() if twist == "exponential" else F.softplus(step)
        rates = self.A_log.exp() if twist == "growing" else -self.A_log.exp()
        state, rows = u.new_zeros(len(x), INNER, STATE), []
        for t in range(length):
            state = (step[:, t, :, None] * rates).exp() * state + (step[:, t] * u[:, t])[..., None] * b[:, t, None]
            rows.append((state * c[:, t, None]).sum(-1))
        y = torch.stack(rows, 1) + self.D * u
        y = self.out_proj(y * (z.sigmoid() if twist == "sigmoid" else F.silu(z)))
        return y.flip(1) if twist == "backwards" else y


class OwnMamba2(nn.Module):
    """A Mamba-2 of a user's own."""

    def __init__(self, twist: str = "", groups: int = 1) -> None:
        super().__init__()
        self.twist, self.ngroups, mixed = twist, groups, INNER + 2 * STATE * groups
        self.in_proj = nn.Linear(DIM, INNER + mixed + HEADS, bias=False)
        self.conv1d = nn.Conv1d(mixed, mixed, TAPS, groups=mixed, padding=TAPS - 1)
        self.dt_bias, self.A_log = nn.Parameter(torch.zeros(HEADS)), nn.Parameter(torch.zeros(HEADS))
        self.D, self.norm = nn.Parameter(torch.ones(HEADS)), nn.RMSNorm(INNER, eps=1e-5)
        self.out_proj = nn.Linear(INNER, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        sizes = [INNER, INNER + 2 * STATE * self.ngroups, HEADS]
        z, mixed, step = self.in_proj(x).split(sizes, -1)
        mixed = F.silu(self.conv1d(mixed.mT)[..., : x.shape[1]].mT)
        u, b, c = mixed.split([INNER, STATE * self.ngroups, STATE * self.ngroups], -1)
        share = HEADS // self.ngroups
        b, c = (part.unflatten(-1, (self.ngroups, STATE)).repeat_interleave(share, -2) for part in (b, c))
        if self.twist == "b for c":
            b, c = c, b
        step = F.softplus(step if self.twist == "no bias" else step + self.dt_bias)
        u = u.unflatten(-1, (HEADS, -1))
        if self.twist == "interleaved":
            u = u.reshape(*u.shape[:2], -1, HEADS).mT
        state, rows = u.new_zeros(len(x), *u.shape[2:], STATE), []
        for t in range(x.shape[1]):
            decay = (-step[:, t] * self.A_log.exp()).exp()[..., None, None]
            state = decay * state + (step[:, t, :, None] * u[:, t])[..., None] * b[:, t, :, None]
            rows.append((state * c[:, t, :, None]).sum(-1))
        y = (torch.stack(rows, 1) + self.D[:, None] * u).flatten(2)
        return self.out_proj(self.norm(y) if self.twist == "no gate" else self.norm(y * F.silu(z)))


def ours(own: nn.Module) -> nn.Module:
    if isinstance(own, OwnMamba1):
        mixer: nn.Module = Mamba1(DIM, STATE, conv_size=TAPS, dt_rank=RANK)
    else:
        mixer = Mamba2(DIM, STATE, head_dim=INNER // HEADS, conv_size=TAPS, groups=own.ngroups)
    mixer.load_state_dict(own.state_dict())
    return mixer.to(torch.float64)


@torch.no_grad()
@pytest.mark.parametrize("make", [OwnMamba1, OwnMamba2, lambda: OwnMamba2(groups=2), lambda: OwnMamba2(groups=3)])
def test_a_mixer_of_a_user_s_own_is_written_as_ours_is(make: Callable[[], nn.Module]) -> None:
    own = make().double()
    twin, x = ours(own), torch.randn(2, 7, DIM, dtype=torch.float64, generator=seeded())
    if getattr(own, "ngroups", 1) == 1:  # ours normalises each group by itself
        torch.testing.assert_close(own(x), twin(x), rtol=1e-4, atol=1e-5)
    before = {name: value.clone() for name, value in own.state_dict().items()}
    [row] = espalier.structure_(own, generator=seeded()).layers
    assert (row.kind, row.status) == ("ssm", "written")
    assert "proven by a run" in row.note
    espalier.structure_(twin, generator=seeded())
    torch.testing.assert_close(own.state_dict(), twin.state_dict(), rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(before[name], value) for name, value in own.state_dict().items())


def test_rows_that_are_exchanged_within_a_map_of_the_user_s_own_are_seen() -> None:
    own = OwnMamba2()

    class Exchanged(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            z, b, c, step = super().forward(input).split([2 * INNER, STATE, STATE, HEADS], -1)
            return torch.cat([z, c, b, step], -1)

    own.in_proj = Exchanged(DIM, 2 * INNER + 2 * STATE + HEADS, bias=False)
    [(_, _, found)] = list(find_layers(own))
    assert isinstance(found, Skipped)


@pytest.mark.parametrize(
    ("kind", "twist"),
    [
        *((OwnMamba1, twist) for twist in (
            "backwards", "exchanged", "ahead", "relu", "step last", "b for c", "exponential", "growing", "sigmoid"
        )),
        *((OwnMamba2, twist) for twist in ("b for c", "no bias", "interleaved", "no gate")),
    ],
)  # fmt: skip
def test_what_computes_something_else_is_left_alone(kind: type[nn.Module], twist: str) -> None:
    own = kind(twist)
    before = {name: value.clone() for name, value in own.state_dict().items()}
    [(_, _, found)] = list(find_layers(own))
    assert isinstance(found, Skipped)
    assert "its output is not that of Mamba-" in found.reason
    with pytest.raises(EspalierError, match="no ssm layer to structure"):
        espalier.structure_(own, ssm=espalier.MimeticSSM(), attention=None, depthwise=None, generator=seeded())
    assert all(torch.equal(before[name], value) for name, value in own.state_dict().items())


def test_a_known_mixer_whose_parts_are_called_otherwise_is_skipped() -> None:
    class Renamed(Mamba1):
        def __init__(self) -> None:
            super().__init__(DIM)
            self.first = self.in_proj
            del self.in_proj

        def forward(self, x: Tensor) -> Tensor:
            return self.out_proj(self.first(x).chunk(2, -1)[0])

    [(_, _, found)] = list(find_layers(nn.Sequential(Renamed())))
    assert isinstance(found, Skipped)


class Held(nn.Module):
    """A linear map whose weight lies deeper, as an adapter's or a quantised one's does."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.inner = layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out


def wrapped(own: nn.Module, name: str) -> None:
    setattr(own, name, Held(own.get_submodule(name)))


@pytest.mark.parametrize("kind", [OwnMamba1, OwnMamba2])
@pytest.mark.parametrize(
    "change",
    [
        lambda own: wrapped(own, "in_proj"),
        lambda own: wrapped(own, "out_proj"),
        lambda own: wrapped(own, "conv1d"),
        lambda own: delattr(own, "D"),
        lambda own: setattr(own, "D", nn.Parameter(torch.ones(5, 1, 7))),
        lambda own: setattr(own, "A_log", nn.Parameter(torch.ones(2))),
        lambda own: setattr(own, "norm", nn.Bilinear(INNER, INNER, INNER)),
        lambda own: setattr(own, "in_proj", nn.Linear(DIM, 3, bias=False)),
        lambda own: setattr(own, "in_proj", nn.Conv1d(DIM, 2 * INNER, 1)),
    ],
)
def test_mixers_with_parts_of_another_kind_never_end_in_an_error(
    kind: type[nn.Module], change: Callable[[nn.Module], None]
) -> None:
    own = kind()
    change(own)
    [found] = [found for _, _, found in find_layers(own) if found.kind == "ssm"]
    assert isinstance(found, Skipped) or isinstance(own, OwnMamba1)


class Mamba(OwnMamba1):
    """A fork's mixer, which scans backwards, too, with parameters of its own (Vision Mamba's)."""

    def __init__(self, *, used: bool) -> None:
        super().__init__()
        self.A_b_log, self.used = nn.Parameter(self.A_log.detach().clone()), used

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if not self.used:
            return y
        forth, self.A_log = self.A_log, self.A_b_log
        back = super().forward(x.flip(1)).flip(1)
        self.A_log = forth
        return y + back


@pytest.mark.parametrize("used", [False, True])
def test_a_fork_under_a_librarys_name_is_proven_where_it_has_more_parameters(
    used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Mamba, "__module__", "mamba_ssm.modules.mamba_simple")
    net = nn.Sequential(Mamba(used=used))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    if not used:  # a run shows that they do nothing
        assert [row.status for row in espalier.structure_(net, generator=seeded()).layers] == ["written"]
        return
    with pytest.raises(EspalierError, match="its class is not known to have A_b_log, and not proven by a run"):
        espalier.structure_(net, generator=seeded())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
