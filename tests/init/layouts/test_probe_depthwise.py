"""Depthwise convolutions: filters are centred on the tap that meets the present, or the layer is left alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import espalier
from espalier.init.layouts import DepthwiseWeights, Skipped, find_layers

DIM = 8


class Block(nn.Module):
    """A depthwise convolution over time, padded in front by the module, cropped behind, gated and residual or not."""

    def __init__(self, taps: int, inside: int, front: int, *, gate: bool, residual: bool, channels_last: bool) -> None:
        super().__init__()
        self.conv = nn.Conv1d(DIM, DIM, taps, groups=DIM, padding=inside)
        self.front, self.gate, self.residual, self.channels_last = front, gate, residual, channels_last
        self.mix = nn.Linear(DIM, 2 * DIM if gate else DIM)

    def forward(self, x: Tensor, cache: Tensor | None = None) -> Tensor:
        time_last = (lambda t: t.mT) if self.channels_last else (lambda t: t)
        mixed = self.mix(x if self.channels_last else x.mT)
        mixed, gate = mixed.chunk(2, -1) if self.gate else (mixed, None)
        length = mixed.shape[1]
        padded = F.pad(mixed.mT, (self.front, self.conv.kernel_size[0]))
        out = self.conv(padded)[..., :length].mT
        out = out * gate if gate is not None else out
        out = time_last(out.mT) if not self.channels_last else out
        return x + out if self.residual else out


def found_in(model: nn.Module) -> DepthwiseWeights | Skipped:
    [found] = [found for _, _, found in find_layers(model)]
    assert isinstance(found, DepthwiseWeights | Skipped)
    return found


@settings(max_examples=40, deadline=None)
@given(
    taps=st.integers(3, 7), inside=st.integers(0, 6), front=st.integers(0, 6), gate=st.booleans(),
    residual=st.booleans(), channels_last=st.booleans(),
)  # fmt: skip
def test_the_centre_is_the_tap_that_meets_the_present(
    taps: int, inside: int, front: int, gate: bool, residual: bool, channels_last: bool
) -> None:
    # Output t is Σ_c w_c x[t + c − (inside + front)]: the tap c* = inside + front meets the present.
    block = Block(taps, inside, front, gate=gate, residual=residual, channels_last=channels_last)
    found, present = found_in(nn.ModuleList([block])), inside + front
    if present < taps:
        assert isinstance(found, DepthwiseWeights)
        assert found.centre == (present,)
        assert ("causal" in found.note) == (present == taps - 1)
        assert bool(found.note) == (present != taps // 2)
    else:
        assert isinstance(found, Skipped), (found, present, taps)
        assert "unknown" in found.reason


class Streaming(nn.Module):
    """A module that keeps its past: what it is given cannot be made up."""

    def __init__(self, **options: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(DIM, DIM, 5, groups=DIM, **options)

    def forward(self, x: dict[str, Tensor], cache: dict[str, Tensor]) -> Tensor:
        return self.conv(torch.cat([cache["past"], x["new"]], -1))


class Unrunnable(Streaming):
    """The same without a past."""

    def forward(self, x: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return self.conv(x["new"])


def test_what_keeps_a_past_and_cannot_be_run_is_causal_by_full_padding_or_skipped() -> None:
    assert isinstance(found_in(nn.ModuleList([Streaming()])), Skipped)
    assert isinstance(found_in(nn.ModuleList([Streaming(padding=2)])), Skipped)
    assert isinstance(found_in(nn.ModuleList([Unrunnable(padding=4)])), Skipped)
    found = found_in(nn.ModuleList([Streaming(padding=4)]))
    assert isinstance(found, DepthwiseWeights)
    assert found.centre == (4,)


def test_images_stay_centred_and_their_notes_say_what_is_special() -> None:
    for options, words in (
        ({"kernel_size": 7}, ""),
        ({"kernel_size": 3}, "3 taps"),
        ({"kernel_size": 7, "stride": 2}, "strided"),
    ):
        layer = nn.Conv2d(DIM, DIM, padding=options["kernel_size"] // 2, groups=DIM, **options)
        model = nn.Sequential(layer)
        found = found_in(model)
        assert isinstance(found, DepthwiseWeights)
        assert found.centre == layer.padding
        note = espalier.audit(model).layers[0].note
        assert words in note
        assert bool(note) == bool(words)
        assert ";" not in note  # said once


class SamePadded(nn.Conv2d):
    """A convolution that pads by itself, as TensorFlow does."""

    def forward(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        for size, taps, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((-(-size // stride) - 1) * stride + taps - size, 0)
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Causal2d(nn.Conv2d):
    """A convolution whose first axis is time."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (2, 2, 4, 0)))


def test_subclasses_that_pad_by_themselves_are_run() -> None:
    for stride in (1, 2):
        found = found_in(nn.Sequential(SamePadded(DIM, DIM, 5, stride, groups=DIM)))
        assert isinstance(found, DepthwiseWeights), found
        assert found.centre == (2, 2)
    found = found_in(nn.Sequential(Causal2d(DIM, DIM, 5, groups=DIM)))
    assert isinstance(found, DepthwiseWeights), found
    assert found.centre == (4, 2)


def test_causal_filters_peak_at_the_newest_tap() -> None:
    block = Block(4, 3, 0, gate=False, residual=False, channels_last=True)
    [row] = espalier.structure_(nn.ModuleList([block]), generator=torch.Generator().manual_seed(0)).layers
    assert row.status == "written"
    energy = block.conv.weight.detach().square().mean((0, 1))
    assert int(energy.argmax()) == 3, energy


@pytest.mark.parametrize("steps", [1, 2])
def test_lfm2_s_short_convolution_peaks_at_the_newest_tap(steps: int) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Lfm2Config(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1, vocab_size=50,
        intermediate_size=32, layer_types=["conv"], conv_L_cache=2 + steps,
    )  # fmt: skip
    model = transformers.Lfm2Model(config)
    [row] = espalier.structure_(model, generator=torch.Generator().manual_seed(0)).layers
    energy = model.layers[0].conv.conv.weight.detach().square().mean((0, 1))
    assert int(energy.argmax()) == 1 + steps, energy
    assert "causal" in row.note


class Conformer(nn.Module):
    """A convolution behind a norm of each token, or of all of them, and a gate that pools over them."""

    def __init__(self, norm: str, front: int, taps: int, pooled: bool) -> None:
        super().__init__()
        self.norm = {"layer": nn.LayerNorm(DIM), "group": nn.GroupNorm(2, DIM), "instance": nn.InstanceNorm1d(DIM)}[
            norm
        ]
        self.first, self.last, self.gate = nn.Linear(DIM, 2 * DIM), nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.conv, self.front, self.pooled = nn.Conv1d(DIM, DIM, taps, groups=DIM), front, pooled

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x) if isinstance(self.norm, nn.LayerNorm) else self.norm(x.mT).mT
        y = F.pad(F.glu(self.first(y)).mT, (self.front, self.conv.kernel_size[0] - 1 - self.front))
        y = F.silu(self.conv(y).mT)
        return x + self.last(y * self.gate(y.mean(1, keepdim=True)).sigmoid() if self.pooled else y)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("norm", ["layer", "group", "instance"])
@pytest.mark.parametrize("front", [7, 14, 5])
def test_what_moves_all_positions_a_little_hides_no_tap(norm: str, front: int, pooled: bool) -> None:
    found = found_in(nn.Sequential(Conformer(norm, front, 15, pooled)))
    assert isinstance(found, DepthwiseWeights)
    assert found.centre == (front,)


class Drowned(nn.Module):
    """A filter beside a much stronger mean over all positions, and a residual."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share, self.conv = share, nn.Conv2d(DIM, DIM, 5, padding=2, groups=DIM)

    def forward(self, x: Tensor) -> Tensor:
        return x + x.mean((2, 3), keepdim=True) + self.share * self.conv(x)[:, :DIM]


@pytest.mark.parametrize("share", [1.0, 1e-4])
def test_taps_that_are_hidden_by_what_mixes_all_positions_are_those_of_the_padding(share: float) -> None:
    found = found_in(nn.ModuleList([Drowned(share)]))
    assert isinstance(found, DepthwiseWeights)
    assert found.centre == (2, 2)


class Two(nn.Module):
    """Two filters, one beside the other or behind it, of what is moved on by some positions."""

    def __init__(self, by: int, *, beside: bool) -> None:
        super().__init__()
        self.by, self.beside = by, beside
        self.first, self.second = (nn.Conv1d(DIM, DIM, 5, padding=2, groups=DIM) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = x.roll(self.by, -1)
        return self.first(y) + self.second(y) if self.beside else self.second(F.gelu(self.first(y)))


@pytest.mark.parametrize("by", [-2, 0, 1, 2])
def test_a_filter_beside_another_hides_no_tap(by: int) -> None:
    for _, _, found in find_layers(Two(by, beside=True)):
        assert isinstance(found, DepthwiseWeights), found
        assert found.centre == (2 + by,)


def test_padding_is_not_believed_against_a_run() -> None:
    # A filter that others blur may be where its padding says, unless nothing moves there.
    for _, _, found in find_layers(Two(0, beside=False)):
        assert isinstance(found, DepthwiseWeights), found
        assert found.centre == (2,)
    for by in (-8, 9):
        for beside in (True, False):
            for _, _, found in find_layers(Two(by, beside=beside)):
                assert isinstance(found, Skipped), found
                assert beside or "not where its padding says" in found.reason


def test_several_filters_a_channel_are_left_alone() -> None:
    [found] = [found for _, _, found in find_layers(nn.Sequential(nn.Conv2d(DIM, 2 * DIM, 5, padding=2, groups=DIM)))]
    assert isinstance(found, Skipped)
    assert "2 filters a channel" in found.reason
