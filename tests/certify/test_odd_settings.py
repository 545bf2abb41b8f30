"""Modules that reach past their input or are set to what no constructor sets: refused, or bounded as they run."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from espalier.certify import UncertifiableError, certify, lipschitz_bound
from espalier.errors import EspalierError
from espalier.nn import BatchCentering, CayleyConv2d, ConvexSum, Householder
from experiments.adversarial_models import attack, steepness
from experiments.adversarial_parts import Asking
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
    (lambda: _set(CayleyConv2d(2, 1, 3), bias=nn.Parameter(torch.zeros(5))), r"its bias is \(5,\): \(1,\) is needed"),
    (lambda: _set(Householder(2), channels=3), "one a pair of channels"),
])  # fmt: skip
def test_what_no_constructor_sets_is_named(change: Any, words: str) -> None:
    layer = change()
    with pytest.raises(UncertifiableError, match=words):
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
