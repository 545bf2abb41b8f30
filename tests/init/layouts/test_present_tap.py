"""Filters peak at the tap whose value a network puts where its input was, seen by an impulse; or are left alone."""

from __future__ import annotations

import contextlib
import copy
import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import espalier
from espalier.errors import EspalierError
from espalier.init.layouts import DepthwiseWeights, Skipped, find_layers
from espalier.models import ConvMixer

WIDTH = 64
# Nearly a single tap, so that few filters show which.
SPEC = espalier.FilterCovariance(sigma0=0.2, v=0.0, a=0.0)
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d}
CONSTANT_PADS = {1: nn.ConstantPad1d, 2: nn.ConstantPad2d}
# (front, back) on every axis.
Ends = tuple[tuple[int, int], ...]


def padded(x: Tensor, ends: Ends) -> Tensor:
    return F.pad(x, [size for pair in reversed(ends) for size in pair])


def cropped(x: Tensor, ends: Ends) -> Tensor:
    for axis, (front, back) in enumerate(ends, start=2):
        x = x.narrow(axis, front, x.shape[axis] - front - back)
    return x


class Pad(nn.Module):
    def __init__(self, ends: Ends) -> None:
        super().__init__()
        self.ends = ends

    def forward(self, x: Tensor) -> Tensor:
        return padded(x, self.ends)


class Chomp(Pad):
    def forward(self, x: Tensor) -> Tensor:
        return cropped(x, self.ends)


class Around(nn.Module):
    """Pads, calls a part and crops, all in its own code."""

    def __init__(self, part: nn.Module, pads: Ends, crops: Ends) -> None:
        super().__init__()
        self.part, self.pads, self.crops = part, pads, crops

    def forward(self, x: Tensor) -> Tensor:
        return cropped(self.part(padded(x, self.pads)), self.crops)


class AroundSequence(nn.Sequential):
    """A sequence with code of its own."""

    def __init__(self, part: nn.Module, pads: Ends, crops: Ends) -> None:
        super().__init__(part)
        self.pads, self.crops = pads, crops

    def forward(self, x: Tensor) -> Tensor:
        return cropped(super().forward(padded(x, self.pads)), self.crops)


def zeros(ends: Ends) -> Ends:
    return tuple((0, 0) for _ in ends)


def constant_pad(ends: Ends) -> nn.Module:
    return CONSTANT_PADS[len(ends)]([size for pair in reversed(ends) for size in pair], 0.0)


STYLES: dict[str, Any] = {
    "sequence": lambda conv, pads, crops: nn.Sequential(constant_pad(pads), conv, nn.ReLU(), Chomp(crops)),
    "sequence of own pads": lambda conv, pads, crops: nn.Sequential(Pad(pads), conv, Chomp(crops), nn.ReLU()),
    "nested sequence": lambda conv, pads, crops: nn.Sequential(
        nn.Sequential(constant_pad(pads), nn.Sequential(conv, nn.ReLU())), nn.Sequential(Chomp(crops))
    ),
    "module": Around,
    "module of a sequence": lambda conv, pads, crops: Around(nn.Sequential(conv, nn.ReLU()), pads, crops),
    "sequence in a module": lambda conv, pads, crops: Around(
        nn.Sequential(constant_pad(pads), conv, Chomp(crops)), zeros(pads), zeros(crops)
    ),
    "parent pads": lambda conv, pads, crops: Around(Around(conv, zeros(pads), crops), pads, zeros(crops)),
    "parent crops": lambda conv, pads, crops: Around(Around(conv, pads, zeros(crops)), zeros(pads), crops),
    "grandparent crops": lambda conv, pads, crops: Around(
        Around(Around(conv, zeros(pads), zeros(crops)), pads, zeros(crops)), zeros(pads), crops
    ),
    "module in a sequence": lambda conv, pads, crops: nn.Sequential(
        constant_pad(pads), nn.Sequential(Around(conv, zeros(pads), zeros(crops))), Chomp(crops)
    ),
    "own sequence": AroundSequence,
}
# The nearest code that keeps positions decides: where code calls the layer and nothing else, that must not.
INNER_CODE = {"grandparent crops", "module in a sequence"}


@dataclass
class Net:
    """A network, and the tap that it was built to have over the present."""

    net: nn.Module
    present: tuple[int, ...]


@st.composite
def nets(draw: st.DrawFn) -> Net:
    dims = draw(st.integers(1, 2))
    sizes = tuple(draw(st.integers(3, 9 if dims == 1 else 6)) for _ in range(dims))
    style = draw(st.sampled_from(sorted(STYLES)))
    inside = tuple(draw(st.sampled_from([0, (taps - 1) // 2, taps - 1])) for taps in sizes)
    if style in INNER_CODE and all(2 * own == taps - 1 for own, taps in zip(inside, sizes, strict=True)):
        inside = (0,) * dims
    present = tuple(draw(st.sampled_from([0, (k - 1) // 2, k // 2, k - 1, k - 2])) for k in sizes)
    pads, crops = [], []
    for taps, own, tap in zip(sizes, inside, present, strict=True):
        # Padding less cropping is this in front, and that behind; more of both changes nothing.
        front, back, more = tap - own, taps - 1 - tap - own, draw(st.integers(0, 2))
        pads.append((max(front, 0) + more, max(back, 0)))
        crops.append((max(-front, 0) + more, max(-back, 0)))
    conv = CONVOLUTIONS[dims](WIDTH, WIDTH, sizes, groups=WIDTH, padding=inside)
    return Net(STYLES[style](conv, tuple(pads), tuple(crops)), present)


def convolution(net: nn.Module) -> nn.Conv1d | nn.Conv2d:
    [conv] = [part for part in net.modules() if isinstance(part, nn.Conv1d | nn.Conv2d)]
    return conv


@torch.no_grad()
def taps_over_the_present(net: nn.Module) -> list[tuple[int, ...]]:
    """Return the taps whose value appears where an impulse was."""
    net = copy.deepcopy(net)
    conv = convolution(net)
    nn.init.zeros_(conv.bias)
    at = (slice(None), slice(None), *(2 * size + 3 for size in conv.kernel_size))
    x = torch.zeros(1, WIDTH, *(4 * size + 7 for size in conv.kernel_size))
    x[at] = 1.0
    found = []
    for tap in itertools.product(*map(range, conv.kernel_size)):
        conv.weight.zero_()
        conv.weight[(slice(None), slice(None), *tap)] = 1.0
        found += [tap] if float(net(x)[at].sum()) > 0 else []
    return found


def peak(conv: nn.Conv1d | nn.Conv2d) -> tuple[int, ...]:
    energy = conv.weight.detach().square().mean((0, 1))
    return tuple(int(index) for index in torch.unravel_index(energy.argmax(), energy.shape))


@settings(max_examples=40, deadline=None)
@given(drawn=nets())
def test_filters_peak_where_an_impulse_comes_out(drawn: Net) -> None:
    assert taps_over_the_present(drawn.net) == [drawn.present]
    # A map that is cut to half its size may be one of another resolution: then nothing is written.
    with contextlib.suppress(EspalierError):
        espalier.structure_(drawn.net, depthwise=SPEC, generator=torch.Generator().manual_seed(0))
        assert peak(convolution(drawn.net)) == drawn.present


@pytest.mark.parametrize(
    ("style", "inside"),
    [(style, inside) for style in sorted(STYLES) for inside in (0, 3, 6) if style not in INNER_CODE or inside != 3],
)
def test_a_network_that_keeps_no_positions_is_left_alone(style: str, inside: int) -> None:
    conv = nn.Conv1d(WIDTH, WIDTH, 7, groups=WIDTH, padding=inside)
    net = STYLES[style](conv, ((4, 0),), ((0, 1),))
    with pytest.raises(EspalierError, match="unknown"):
        espalier.structure_(net, depthwise=SPEC)


@pytest.mark.parametrize("options", [{"padding": 3}, {"padding": "same"}, {}, {"padding": 3, "stride": 2}])
@pytest.mark.parametrize("cls", [nn.Conv1d, nn.Conv2d])
def test_a_convolution_with_nothing_around_it_is_centred_in_the_middle(cls: Any, options: dict[str, Any]) -> None:
    for net in (layer := cls(WIDTH, WIDTH, 7, groups=WIDTH, **options), nn.Sequential(layer, nn.GELU())):
        [found] = [found for _, _, found in find_layers(net)]
        assert isinstance(found, DepthwiseWeights), found
        assert set(found.centre) == {3}


@pytest.mark.parametrize("options", [{}, {"padding": 6}, {"padding": 4}, {"padding": 2, "dilation": 2}])
def test_padding_that_keeps_no_positions_gives_an_even_kernel_no_centre(options: dict[str, Any]) -> None:
    [found] = [found for _, _, found in find_layers(nn.Sequential(nn.Conv2d(8, 8, 8, groups=8, **options)))]
    assert isinstance(found, Skipped)


@pytest.mark.parametrize(("taps", "tap"), [(8, 3), (4, 1), (5, 2)])
def test_convmixers_of_even_kernels_peak_at_the_pixel_itself(taps: int, tap: int) -> None:
    net = ConvMixer(WIDTH, 2, taps, 7, num_classes=5)
    rows = espalier.structure_(net, depthwise=SPEC, generator=torch.Generator().manual_seed(0)).layers
    assert [row.status for row in rows] == ["written"] * 2
    for block in net.blocks:
        assert peak(block[0].fn[0]) == (tap, tap)


def test_a_centre_that_is_asked_for_is_kept() -> None:
    net = nn.Sequential(nn.Conv1d(WIDTH, WIDTH, 7, groups=WIDTH, padding=3))
    spec = espalier.FilterCovariance(sigma0=0.2, v=0.0, a=0.0, centre=(1,))
    espalier.structure_(net, depthwise=spec, generator=torch.Generator().manual_seed(0))
    assert peak(net[0]) == (1,)
