"""Depthwise weights are written where an impulse shows them as the kernel, tap by tap; or are left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.init.layouts import DepthwiseWeights, Skipped, find_layers
from espalier.init.layouts.maps import maps
from espalier.models import ConvMixer

DIM, TAPS = 6, 5
Change = Callable[[Tensor], Tensor]


def masked(weight: Tensor) -> Tensor:
    mask = torch.ones_like(weight)
    mask[..., -1] = 0.0
    return weight * mask


def standardised(weight: Tensor) -> Tensor:
    return (weight - weight.mean((1, 2, 3), keepdim=True)) / weight.std((1, 2, 3), keepdim=True)


CHANGES: dict[str, Change] = {
    "as it is": lambda w: w,
    "viewed": lambda w: w.reshape(DIM, -1).view_as(w).contiguous(),
    "standardised": standardised,
    "masked": masked,
    "absolute": torch.abs,
    "mirrored": lambda w: w.flip(-1),
    "turned": lambda w: w.mT,
    "softmaxed": lambda w: w.flatten(2).softmax(-1).view_as(w),
    "gained": lambda w: 1.5 * w,
    "clamped": lambda w: w.clamp(-0.5, 0.5),
    "renormed": lambda w: torch.renorm(w, 2, 0, 1.0),
    "centred": lambda w: w - w.mean((2, 3), keepdim=True),
    "of other channels": lambda w: w.roll(1, 0),
}


class Changing(nn.Module):
    """Makes one weight of another."""

    def __init__(self, change: Change) -> None:
        super().__init__()
        self.change = change

    def forward(self, conv: nn.Conv2d) -> Tensor:
        return self.change(conv.weight)


class Owner(nn.Module):
    """Convolves with what it makes of a layer's weight."""

    def __init__(self, change: Change) -> None:
        super().__init__()
        self.change, self.conv = change, nn.Conv2d(DIM, DIM, TAPS, padding=TAPS // 2, groups=DIM)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.change(self.conv.weight), self.conv.bias, padding=TAPS // 2, groups=DIM)


class OwnerOfHelper(Owner):
    """Lets a part that gets the layer make the kernel."""

    def __init__(self, change: Change) -> None:
        super().__init__(change)
        self.kernel = Changing(change)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel(self.conv), self.conv.bias, padding=TAPS // 2, groups=DIM)


class InPlace(Owner):
    """Writes to the layer before it calls it."""

    def forward(self, x: Tensor) -> Tensor:
        self.conv.weight.data = self.change(self.conv.weight.data)
        return self.conv(x)


class Functional(Owner):
    """Calls the layer with another weight."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.conv, {"weight": self.change(self.conv.weight)}, x)


class Outer(nn.Module):
    """Writes to a layer that another module calls."""

    def __init__(self, change: Change) -> None:
        super().__init__()
        self.change, self.inner = change, Calling()

    def forward(self, x: Tensor) -> Tensor:
        self.inner.conv.weight.data = self.change(self.inner.conv.weight.data)
        return self.inner(x)


class Calling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(DIM, DIM, TAPS, padding=TAPS // 2, groups=DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Subclass(nn.Conv2d):
    """Convolves with what it makes of its weight."""

    def __init__(self, change: Change) -> None:
        super().__init__(DIM, DIM, TAPS, padding=TAPS // 2, groups=DIM)
        self.change = change

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.change(self.weight), self.bias)


class Transposed(Owner):
    """Convolves the other way round."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, self.change(self.conv.weight), None, 1, TAPS // 2, groups=DIM)


class Difference(Owner):
    """Central-difference convolution: less the sum of the kernel times the pixel itself."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) - 0.7 * F.conv2d(x, self.conv.weight.sum((2, 3), keepdim=True), groups=DIM)


STYLES: list[Callable[[Change], nn.Module]] = [
    Owner, OwnerOfHelper, InPlace, Functional, Outer, Subclass, Transposed, Difference,
]  # fmt: skip


@torch.no_grad()
def is_the_kernel(net: nn.Module) -> bool:
    """Return whether an impulse comes out as the weight, mirrored, in every channel."""
    conv = convolution(net)
    kept = conv.weight.detach().clone()
    drawn = torch.randn(kept.shape, generator=torch.Generator().manual_seed(1))
    x = torch.zeros(1, DIM, 4 * TAPS + 1, 4 * TAPS + 1)
    blank = x.clone()
    x[..., 2 * TAPS, 2 * TAPS] = 1.0
    out = []
    for given in (x, blank):
        conv.weight.data = drawn.clone()
        out.append(net(given))
    conv.weight.data = kept
    reach = slice(2 * TAPS - TAPS // 2, 2 * TAPS + TAPS // 2 + 1)
    seen = (out[0] - out[1])[0, :, reach, reach].flip(-1, -2)
    return torch.allclose(seen, drawn[:, 0], atol=1e-5)


def convolution(net: nn.Module) -> nn.Conv2d:
    [conv] = [part for part in net.modules() if isinstance(part, nn.Conv2d)]
    return conv


def found_in(net: nn.Module) -> Any:
    [found] = [found for _, _, found in find_layers(net)]
    return found


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("style", STYLES)
def test_only_a_weight_that_an_impulse_shows_is_written(style: Callable[[Change], nn.Module], change: str) -> None:
    net = style(CHANGES[change])
    wanted = is_the_kernel(net)
    assert not wanted or change in ("as it is", "viewed")
    for around in (net, nn.Sequential(net, nn.ReLU())):
        found = found_in(around)
        assert isinstance(found, DepthwiseWeights if wanted else Skipped), found
        assert wanted or found.reason.startswith("its weight is not the kernel: "), found.reason


class Block(nn.Module):
    """What stands around convolutions in networks, before them and behind."""

    def __init__(self, after: nn.Module, *, gate: bool) -> None:
        super().__init__()
        self.before, self.after, self.gate = nn.BatchNorm2d(DIM), after, nn.Conv2d(DIM, DIM, 1) if gate else None
        self.conv = nn.Conv2d(DIM, DIM, TAPS, padding=TAPS // 2, groups=DIM)

    def forward(self, x: Tensor) -> Tensor:
        y = self.after(self.conv(F.gelu(self.before(x))).to(self.conv.weight.dtype))
        return x + (y * self.gate(x.mean((2, 3), keepdim=True)).sigmoid() if self.gate else y)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize(
    "after", [nn.Identity, nn.ReLU, nn.Tanh, lambda: nn.GroupNorm(1, DIM), lambda: nn.Softmax(1), nn.Dropout]
)
def test_what_stands_around_a_layer_is_no_reason_to_leave_it_alone(after: Callable[[], nn.Module], gate: bool) -> None:
    found = found_in(nn.Sequential(Block(after(), gate=gate)))
    assert isinstance(found, DepthwiseWeights), found
    assert found.centre == (TAPS // 2,) * 2


class Causal(nn.Module):
    """Convolves with a layer's weight, padded otherwise than the layer says."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(DIM, DIM, TAPS, padding=TAPS // 2, groups=DIM)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(F.pad(x, (TAPS - 1, 0)), self.conv.weight, self.conv.bias, groups=DIM)


def test_who_convolves_with_a_layer_s_weight_pads_as_it_likes() -> None:
    found = found_in(Causal())
    assert isinstance(found, DepthwiseWeights), found
    assert found.centre == (TAPS - 1,)


def on_gpu(x: Tensor) -> Tensor:
    raise RuntimeError("no GPU")


class Unrunnable(nn.Module):
    """Wants what is not here."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(DIM, DIM, TAPS, padding=TAPS // 2, groups=DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(on_gpu(x).to(self.conv.weight.dtype))


class UnrunnableStandardised(Unrunnable):
    @property
    def kernel(self) -> Tensor:
        return standardised(self.conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv._conv_forward(on_gpu(x), self.kernel, None)


class UnrunnableByName(UnrunnableStandardised):
    """The same, where the weight is named in a string."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(on_gpu(x), standardised(getattr(self.conv, "weight")), groups=DIM)  # noqa: B009


def test_code_that_cannot_be_run_is_believed_where_it_does_not_touch_weights() -> None:
    assert isinstance(found_in(Unrunnable()), DepthwiseWeights)
    for cls in (UnrunnableStandardised, UnrunnableByName):
        found = found_in(cls())
        assert isinstance(found, Skipped), found
        assert "may change its weight" in found.reason


class Stopped(Calling):
    """Wants what is not here behind the convolution, and another use of the weight elsewhere."""

    def __init__(self, *, less: bool) -> None:
        super().__init__()
        self.less = less

    def forward(self, x: Tensor, step: Tensor | None = None) -> Tensor:
        if step is not None:
            return (step * self.conv.weight[:, 0]).sum((-1, -2))
        y = self.conv(x)
        y = y - F.conv2d(x, self.conv.weight.sum((2, 3), keepdim=True), groups=DIM) if self.less else y
        raise RuntimeError(f"no GPU for {y.shape}")


class Remembering(Calling):
    """Adds what it gave before."""

    def __init__(self) -> None:
        super().__init__()
        self.before: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        self.before = y if self.before is None or self.before.shape != y.shape else self.before + y
        return self.before * x.to(self.conv.weight.dtype)


def test_a_run_that_ends_behind_the_convolution_tells_what_was_done_before() -> None:
    assert isinstance(found_in(Stopped(less=False)), DepthwiseWeights)
    found = found_in(Stopped(less=True))
    assert isinstance(found, Skipped)
    assert "may change its weight" in found.reason


def test_what_a_module_keeps_of_earlier_runs_is_no_other_use() -> None:
    assert isinstance(found_in(nn.Sequential(Remembering())), DepthwiseWeights)


class Tied(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self, *, runs: bool) -> None:
        super().__init__()
        self.runs, self.embedding, self.mixer = runs, nn.Embedding(17, DIM), Past()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.mixed(self.embedding(ids))
        return F.linear(x if self.runs else on_gpu(x), self.embedding.weight)

    def mixed(self, x: Tensor) -> Tensor:
        return self.mixer(x)


class TiedToAll(Tied):
    """The same, where the convolution's weight is used, too."""

    def mixed(self, x: Tensor) -> Tensor:
        return self.mixer(x) + self.mixer.conv.weight.std()


class Past(nn.Module):
    """A causal convolution over time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(DIM, DIM, 4, padding=3, groups=DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.mT)[..., : x.shape[1]].mT


@pytest.mark.parametrize("runs", [True, False])
def test_the_weight_of_an_embedding_is_no_convolution_s(runs: bool) -> None:
    assert isinstance(found_in(Tied(runs=runs)), DepthwiseWeights)
    assert isinstance(found_in(TiedToAll(runs=runs)), Skipped)


@pytest.mark.parametrize("place", ["instance", "class"])
def test_a_block_of_ours_is_believed_unless_its_code_was_replaced(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    net = ConvMixer(DIM, 1, kernel_size=TAPS, patch_size=2)
    assert isinstance(found_in(net), DepthwiseWeights)
    block: Any = net.blocks[0]
    conv = block[0].fn[0]

    def forward(*given: Any) -> Tensor:
        return given[-1] + F.conv2d(given[-1], standardised(conv.weight), padding="same", groups=DIM)

    monkeypatch.setattr(block if place == "instance" else type(block), "forward", forward)
    assert isinstance(found_in(net), Skipped)


def test_code_that_takes_channels_for_examples_needs_little_room() -> None:
    owner = nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8), nn.Flatten(), nn.Linear(10_240, 8))
    for call, _ in maps(owner, owner[0]):  # type: ignore[arg-type]
        assert len(call.args[0]) <= 100  # of which each may become a map of all channels
