"""What a network owns, keeps and is asked: none of it may make a bound be about something else than what runs."""

from __future__ import annotations

import contextlib
import itertools
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from espalier.certify import UncertifiableError, certify, lipschitz_bound
from espalier.nn import BatchCentering, Householder, Normalize


class Runs(nn.Module):
    """A forward pass given as a function of the module and x, in front of a head that adds up all numbers."""

    def __init__(self, function: Callable[..., Tensor], size: int = 4) -> None:
        super().__init__()
        self.function, self.head = function, nn.Linear(size, 2)
        self.state: Any = 0
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([[0.0], [1.0]]).expand(2, size))
            self.head.bias.copy_(torch.tensor([1.0, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self, x).flatten(1))


def test_a_weight_that_is_written_anew_is_bounded_as_it_was_used() -> None:
    class Scratch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scratch", torch.zeros(2, 4))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.scratch[1] = 1.0
                scores = F.linear(x, self.scratch, torch.tensor([3.0, 0.0], dtype=x.dtype))
                self.scratch.zero_()
            return scores

    x = torch.full((2, 4), 0.5)
    radii = certify(Scratch().eval(), x, torch.tensor([0, 0])).radii
    assert radii == pytest.approx([0.5, 0.5])  # 3 − 2, over the norm of four ones


def test_complex_numbers_of_a_network_stay_complex() -> None:
    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = nn.Parameter(torch.tensor([3 + 4j] * 4))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.c.abs()

    assert lipschitz_bound(Gain(), torch.rand(2, 4)) == pytest.approx(5)


class Upsampled(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.repeat_interleave(3, 2).repeat_interleave(3, 3)


def replaced(make: Callable[[], nn.Module], name: str, value: Tensor) -> nn.Module:
    module = make()
    if name in module._parameters:
        setattr(module, name, nn.Parameter(value))
    else:
        module._buffers[name] = value
    return module


def upsampled() -> nn.Module:
    conv = nn.Conv2d(1, 1, 1, padding_mode="replicate", bias=False)
    conv.weight.data.fill_(1.0)
    register_parametrization(conv, "weight", Upsampled(), unsafe=True)
    return conv


@pytest.mark.parametrize(("make", "shape"), [
    (lambda: replaced(lambda: nn.Conv2d(1, 1, 1, padding_mode="reflect", bias=False), "weight", torch.ones(1, 1, 5, 5)),
     (1, 20, 20)),
    (upsampled, (1, 20, 20)),
    (lambda: replaced(lambda: nn.Conv1d(1, 1, 5, padding=2, padding_mode="circular", bias=False), "weight",
                      torch.ones(1, 1, 1)), (1, 4)),
    (lambda: replaced(lambda: Householder(2), "theta", torch.rand(50)), (2,)),
    (lambda: replaced(lambda: BatchCentering(1), "running_mean", torch.rand(50)), (1, 2, 2)),
    (lambda: replaced(lambda: Normalize(0.0), "mean", torch.rand(1, 8, 8)), (1, 1, 1)),
])  # fmt: skip
def test_layers_of_other_shapes_than_their_settings_are_bounded_as_they_run_or_refused(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    net = nn.Sequential(make()).eval()
    x, y = torch.zeros(2, *shape), torch.ones(2, *shape)
    with torch.no_grad():
        slope = float((net(x) - net(y)).norm() / (x - y).norm())
    with contextlib.suppress(UncertifiableError):
        assert lipschitz_bound(net, x) >= slope * (1 - 1e-6)


def rows_above(net: Runs, x: Tensor) -> Tensor:
    h = F.relu(x)
    below = h[:, 1:]
    below += h[:, :-1]
    return F.pad(below, (0, 1))


def into_a_buffer(net: Runs, x: Tensor) -> Tensor:
    token = net.head.weight[:1].expand(x.shape[0], -1)
    token += x
    return token


def test_numbers_that_are_read_while_they_are_written_are_refused() -> None:
    for function in (rows_above, into_a_buffer):
        with pytest.raises(UncertifiableError):
            lipschitz_bound(Runs(function).eval(), torch.rand(2, 4))
    assert lipschitz_bound(nn.Sequential(Runs(lambda net, x: F.relu(x).add_(x))).eval(), torch.rand(2, 4)) < 5


CALLS = itertools.count()


def far(x: Tensor) -> Tensor:
    return F.relu(x - 5)


def by_object(net: Runs, x: Tensor) -> Tensor:
    net.state = net.state or types.SimpleNamespace(calls=0)
    net.state.calls += 1
    return x + (1000.0 if net.state.calls > 100 else 1.0) * far(x)


def by_array(net: Runs, x: Tensor) -> Tensor:
    net.state = np.zeros(1) if isinstance(net.state, int) else net.state + 1
    return x + (1000.0 if net.state[0] > 100 else 1.0) * far(x)


class Counts(nn.Module):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * (1000.0 if self.calls > 100 else 1.0)


def by_hidden_module(net: Runs, x: Tensor) -> Tensor:
    net.state = net.state or [Counts()]
    return x + net.state[0](far(x))


def by_route(net: Runs, x: Tensor) -> Tensor:
    return x + (1000 * far(x), 1 * far(x))[next(CALLS) % 2]


def by_constant(net: Runs, x: Tensor) -> Tensor:
    return x + far(x) * x.new_full((x.shape[0], 1), (1000.0, 1.0)[next(CALLS) % 2])


def by_constant_of_torch(net: Runs, x: Tensor) -> Tensor:
    return x + far(x) * torch.full((x.shape[0], 1), (1000.0, 1.0)[next(CALLS) % 2], dtype=x.dtype)


@pytest.mark.parametrize("function", [
    by_object, by_array, by_hidden_module, by_route, by_constant, by_constant_of_torch,
])  # fmt: skip
def test_what_changes_between_calls_is_noticed_wherever_it_is_kept(function: Callable[..., Tensor]) -> None:
    with pytest.raises(UncertifiableError, match="run again"):
        lipschitz_bound(Runs(function).eval(), torch.rand(2, 4))


@pytest.mark.parametrize("function", [
    lambda net, x: F.relu((x - 0.5) * 1e-30 * 1e39), lambda net, x: F.relu((x - 0.5) * 1e-30 / 1e-46),
    lambda net, x: x * 1e-7 / 2e-45, lambda net, x: F.leaky_relu(x, float("nan")),
    lambda net, x: F.prelu(x, torch.tensor([float("nan")], dtype=x.dtype)),
])  # fmt: skip
def test_numbers_that_the_precision_cannot_hold_are_refused(function: Callable[..., Tensor]) -> None:
    x = torch.rand(2, 4)
    with pytest.raises(UncertifiableError):
        certify(Runs(function).eval(), x, torch.tensor([0, 0]), arithmetic="float32")


def contiguous(net: Runs, x: Tensor) -> bool:
    return far(x).permute(0, 2, 3, 1).contiguous().is_contiguous()


def last(net: Runs, x: Tensor) -> bool:
    return far(x).to(memory_format=torch.channels_last).is_contiguous(memory_format=torch.channels_last)


def viewed(net: Runs, x: Tensor) -> bool:
    try:
        far(x).permute(0, 2, 3, 1).view(x.shape[0], -1)
    except RuntimeError:
        return True
    return False


@pytest.mark.parametrize("ask", [contiguous, last, viewed, lambda net, x: far(x).is_leaf])
def test_questions_are_answered_as_a_plain_run_would(ask: Callable[..., bool]) -> None:
    net = Runs(lambda net, x: x + (1000.0 if ask(net, x) else 1.0) * F.relu(x - 1), 12).eval()
    x = torch.rand(2, 3, 2, 2)
    with torch.no_grad():
        slope = 1000.0 if ask(net, x) else 1.0
    with contextlib.suppress(UncertifiableError):
        assert lipschitz_bound(net, x) >= slope


def test_a_hook_that_holds_the_network_itself_and_counts_there_is_noticed() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).eval()
    net.calls = 0

    def count(module: nn.Module, given: Any, out: Tensor) -> Tensor:
        net.calls += 1
        return out * (1000.0 if net.calls > 100 else 1.0)

    net[0].register_forward_hook(count)
    for prove in (
        lambda: certify(net, torch.rand(2, 4), torch.tensor([0, 0])),
        lambda: lipschitz_bound(net, torch.rand(2, 4)),
    ):
        with pytest.raises(UncertifiableError, match=r"changed the network itself|run again"):
            prove()


def test_a_network_that_copies_share_is_refused_and_left_alone() -> None:
    class Shared(nn.Linear):
        def __deepcopy__(self, memo: Any) -> Shared:
            return self

    class Calibrated(nn.Linear):
        gain = 1.0

        def __getstate__(self) -> dict[str, Any]:
            return {key: value for key, value in vars(self).items() if key != "gain"}

    net, x = nn.Sequential(Shared(4, 2)).eval(), torch.rand(2, 4)
    before = net(x)
    with pytest.raises(UncertifiableError, match="shares"):
        certify(net, x, torch.tensor([0, 0]))
    assert torch.equal(net(x), before)
    calibrated = Calibrated(4, 2).eval()
    calibrated.gain = 1000.0
    with pytest.raises(UncertifiableError, match="other attributes"):
        certify(calibrated, x, torch.tensor([0, 0]))
