"""Modules that reach past their input or are set to what no constructor sets: refused, or bounded as they run."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from torch.optim.swa_utils import AveragedModel

from espalier.certify import UncertifiableError, certify, lipschitz_bound
from espalier.errors import EspalierError
from espalier.nn import BatchCentering, CayleyConv2d, CayleyLinear, ConvexSum, Householder, ScaledAvgPool2d
from experiments.adversarial_models import attack, steepness
from experiments.adversarial_parts import Asking, Function
from experiments.adversarial_settings import PAST, Odd, past_its_input

PARTS: dict[str, nn.Module] = {
    **{f"the module inside {kind}": past_its_input(kind) for kind in PAST},
    **{f"an odd {kind}": Odd(kind, 2) for kind in Odd.KINDS},
    **{f"asks {question}": Asking(question) for question in Asking.QUESTIONS},
}


@pytest.mark.parametrize("arithmetic", ["float64", "float32"])
@pytest.mark.parametrize("words", PARTS)
def test_no_image_falls_within_its_radius(words: str, arithmetic: str) -> None:
    generator, dtype = torch.Generator().manual_seed(0), getattr(torch, arithmetic)
    part = PARTS[words].eval()
    x = 0.9 + 0.1 * torch.rand(4, 2, 4, 4, generator=generator)
    with torch.no_grad():
        head = nn.Linear(copy.deepcopy(part)(x.clone()).flatten(1).shape[1], 3)
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator))
    net = nn.Sequential(copy.deepcopy(part), nn.Flatten(), head).eval().requires_grad_(False)
    labels = copy.deepcopy(net).to(dtype)(x.to(dtype)).argmax(1)
    try:
        radii = certify(net, x, labels, arithmetic=arithmetic).radii
    except EspalierError:
        return
    assert attack(net, x, labels, radii, dtype, 0).violations == 0


@pytest.mark.parametrize("kind", PAST)
def test_a_stated_constant_holds_for_what_the_module_inside_does(kind: str) -> None:
    net, generator = past_its_input(kind), torch.Generator().manual_seed(0)
    for example in (torch.rand(2, 2, 4, 4, generator=generator), None):
        try:
            claimed = lipschitz_bound(net, example)
        except UncertifiableError:
            continue
        assert steepness(net, (2, 4, 4), generator, torch.float64) <= claimed * (1 + 1e-3)  # differences of float32


class Louder(Tensor):
    """A tensor that makes ten times of what it is taken from."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        return 10 * result.as_subclass(Tensor) if getattr(func, "__name__", "") in ("sub", "__sub__") else result

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.as_subclass(Tensor).clone().as_subclass(Louder)


def test_tensors_of_a_class_of_their_own_are_not_taken_for_plain_ones() -> None:
    layer = BatchCentering(2).eval()
    layer._buffers["running_mean"] = torch.zeros(2).as_subclass(Louder)
    a, b = torch.rand(2, 1, 2, 4, 4)
    assert float((layer(a) - layer(b)).norm() / (a - b).norm()) == pytest.approx(10)
    for example in (a, None):
        with pytest.raises(UncertifiableError, match="Louder"):
            lipschitz_bound(layer, example)


def test_numbers_of_numpy_are_numbers() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.leaky_relu(x * np.float64(3.0), np.float32(2.0)) + x[:, : np.int64(1)]

    assert lipschitz_bound(Scaled(), torch.rand(2, 4)) == pytest.approx(6 + 2)  # the first number is added four times


def test_things_that_torch_turns_into_numbers_are_refused() -> None:
    class Index:
        def __index__(self) -> int:
            return 1

    class Rolled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.roll(Index(), 1)  # type: ignore[arg-type]

    with pytest.raises(UncertifiableError, match="given a Index"):
        lipschitz_bound(Rolled(), torch.rand(2, 4))


@pytest.mark.parametrize(("change", "words"), [
    (lambda: _set(CayleyConv2d(2, 1, 3), bias=nn.Parameter(torch.zeros(5))), r"bias is \(5,\): give \(1,\)"),
    (lambda: _set(Householder(2), channels=3), "one a pair of channels"),
])  # fmt: skip
def test_what_no_constructor_sets_is_named(change: Any, words: str) -> None:
    layer = change()
    with pytest.raises(EspalierError, match=words):
        lipschitz_bound(layer.eval(), torch.rand(1, getattr(layer, "channels", 2), 4, 4))


def _set(layer: nn.Module, **settings: Any) -> nn.Module:
    for name, value in settings.items():
        setattr(layer, name, value)
    return layer


def test_a_denormal_divisor_is_refused_as_processors_may_take_it_for_zero() -> None:
    class Divided(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 1e-36 / torch.tensor(1e-39)

    with pytest.raises(UncertifiableError, match="denormal"):
        certify(
            nn.Sequential(Divided(), nn.Linear(4, 2)), torch.rand(2, 4), torch.zeros(2).long(), arithmetic="float32"
        )


def test_the_module_inside_of_a_residual_is_counted_as_it_is_called() -> None:
    x = torch.rand(2, 4)
    twice = nn.Linear(4, 4)
    with torch.no_grad():
        twice.weight.copy_(3 * torch.eye(4))
    nested = ConvexSum(ConvexSum(twice, 0.5), 0.25)  # 0.75 + 0.25·(0.5 + 0.5·3)
    assert [lipschitz_bound(nested, example) for example in (x, None)] == pytest.approx([1.25, 1.25])
    twice.register_forward_hook(lambda module, args, out: 2 * out)
    loud = 0.75 + 0.25 * (0.5 + 0.5 * 6)
    assert [lipschitz_bound(nested, example) for example in (x, None)] == pytest.approx([loud, loud])


def _ticks() -> Iterator[int]:
    yield from [1] * 1000
    while True:
        yield 50


@functools.cache
def _seen(number: int) -> int:
    return number


TICKS = _ticks()
COUNTERS: dict[str, Callable[[], int]] = {
    "a generator": lambda: next(TICKS),
    "a cache": lambda: _seen(_seen.cache_info().misses) // 1000 + 1,
}


@pytest.mark.parametrize("kind", COUNTERS)
def test_what_keeps_count_outside_of_a_network_is_seen(kind: str) -> None:
    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + COUNTERS[kind]() * (x - 1).relu()

    with pytest.raises(UncertifiableError, match="keep count"):
        certify(nn.Sequential(Counting(), nn.Linear(4, 2)), torch.rand(2, 4), torch.zeros(2).long())


class Meaning:
    """A thing that torch asks what an operation with it means."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Tensor:
        x: Tensor = args[1]
        return x + (50 if type(x) is Tensor else 1) * (x - 1).relu()


class OfAnotherClass(nn.Module):
    def __deepcopy__(self, memo: Any) -> nn.Module:
        return _twin()

    def forward(self, x: Tensor) -> Tensor:
        return 50 * x


def _twin() -> nn.Module:
    class OfAnotherClass(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    OfAnotherClass.__qualname__ = "OfAnotherClass"
    return OfAnotherClass()


class ByGradients(nn.Module):
    def forward(self, bias: Tensor) -> Tensor:
        return bias + 5 * torch.is_grad_enabled()


def _asking_layer() -> nn.Module:
    layer = CayleyLinear(4, 4)
    register_parametrization(layer, "bias", ByGradients())
    return layer


def _patched(wrapper: nn.Module, **changes: Any) -> nn.Module:
    vars(wrapper).update(changes)
    return wrapper


IMPOSTERS: dict[str, Callable[[], nn.Module]] = {
    "an argument with a meaning of its own": lambda: Function("meaning", lambda x: torch.add(Meaning(), x)),  # type: ignore[call-overload]
    "a copy of another class": OfAnotherClass,
    "a parametrisation that asks": _asking_layer,
    "a compiled net with another forward pass": lambda: _patched(
        torch.compile(nn.Linear(4, 4), backend="eager"), forward=lambda x: 50 * x
    ),
    "a wrapper with another call": lambda: _patched(AveragedModel(nn.Linear(4, 4)), _call_impl=lambda x: 50 * x),
}


@pytest.mark.parametrize("kind", IMPOSTERS)
def test_what_runs_as_something_else_than_it_is_bounded_as_is_refused(kind: str) -> None:
    with pytest.raises(UncertifiableError):
        certify(nn.Sequential(IMPOSTERS[kind](), nn.Linear(4, 2)).eval(), torch.rand(2, 4), torch.zeros(2).long())


def test_a_patch_of_torch_that_a_layer_uses_takes_its_rule_away(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = ScaledAvgPool2d(2), torch.rand(1, 2, 4, 4)
    assert lipschitz_bound(layer, x) == pytest.approx(1.0)
    whole = nn.functional.avg_pool2d
    monkeypatch.setattr(nn.functional, "avg_pool2d", lambda *args: 10 * whole(*args))
    assert lipschitz_bound(layer, x) == pytest.approx(10.0)


def test_complex_images_are_refused() -> None:
    with pytest.raises(EspalierError, match="complex"):
        lipschitz_bound(nn.Linear(4, 2), torch.rand(2, 4, dtype=torch.complex64))


def test_a_module_may_keep_its_input_to_look_at_later() -> None:
    class Keeping(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.last_input = x
            return super().forward(x)

    net = nn.Sequential(Keeping(4, 2))
    assert len(certify(net, torch.rand(2, 4), torch.zeros(2).long()).radii) == 2


def test_a_statement_stands_for_operations_without_a_rule_with_and_without_an_example() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fn = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.ifft(torch.fft.fft(self.fn(x))).real

        def lipschitz_constant_from(self, bound: Callable[[nn.Module], float]) -> float:
            return bound(self.fn)

    net = nn.Sequential(Turned(), nn.Linear(4, 2))
    assert lipschitz_bound(net, torch.rand(2, 4)) == pytest.approx(lipschitz_bound(net))
