"""What users bring: transposed convolutions, models in torch's wrappers, the activations of orthogonium."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MethodType
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from espalier.certify import UncertifiableError, certify, lipschitz_bound, register_lipschitz
from espalier.certify.layers import RULES
from espalier.nn import CayleyLinear
from experiments.adversarial_models import attack


def dense(layer: nn.Module, shape: tuple[int, ...]) -> float:
    """Return the norm of an affine layer in float64, column by column."""
    layer = copy.deepcopy(layer).double()
    basis = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
    columns = layer(basis) - layer(torch.zeros_like(basis[:1]))
    return torch.linalg.matrix_norm(columns.flatten(1), 2).item()


@settings(max_examples=25, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 3),
    padding=st.integers(0, 1),
    extra=st.integers(0, 2),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2]),
)
def test_transposed_convolutions_are_bounded(
    kernel: tuple[int, int], stride: int, padding: int, extra: int, dilation: int, groups: int
) -> None:
    if extra >= max(stride, dilation):
        return
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(2, 4, kernel, stride, padding, extra, groups, dilation=dilation)
    exact = dense(layer, (2, 4, 5))
    assert exact <= lipschitz_bound(layer)
    assert exact <= lipschitz_bound(layer, torch.rand(1, 2, 4, 5))
    if padding == 0 and all(k <= stride for k in kernel) and dilation == 1:  # patches do not overlap
        assert lipschitz_bound(layer) == pytest.approx(exact, rel=1e-6)


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.ConvTranspose2d(1, 2, 2, stride=2), nn.Flatten(), nn.Linear(32, 3)).eval()


def assert_same_certificate(model: nn.Module, net: nn.Module, kind: str) -> None:
    x = torch.rand(6, 1, 2, 2)
    labels = net(x).argmax(1)
    inner, found = certify(net, x, labels), certify(model, x, labels)
    assert found.radii == inner.radii
    assert max(found.radii) > 0
    assert found.assumptions[:-1] == inner.assumptions
    assert kind in found.assumptions[-1]
    assert attack(net, x, labels, found.radii, torch.float64, 0).violations == 0


def test_wrapped_models_are_certified_by_what_is_inside() -> None:
    net = small_net()
    for model in (nn.DataParallel(net), torch.optim.swa_utils.AveragedModel(net), nn.Sequential(nn.DataParallel(net))):
        kind = type(model[0] if isinstance(model, nn.Sequential) else model).__name__
        assert_same_certificate(model.eval(), net, kind)


def test_an_averaged_model_is_certified_at_its_averaged_weights() -> None:
    net = small_net()
    averaged = torch.optim.swa_utils.AveragedModel(net)
    averaged.update_parameters(net)  # the first one copies
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(3.0)
    averaged.update_parameters(net)
    assert_same_certificate(averaged.eval(), averaged.module, "AveragedModel")
    assert lipschitz_bound(averaged) == pytest.approx(lipschitz_bound(net) * (2 / 3) ** 2, rel=1e-5)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_a_distributed_model_is_certified_by_what_is_inside() -> None:
    net = small_net()
    assert_same_certificate(nn.parallel.DistributedDataParallel(net).eval(), net, "DistributedDataParallel")


@pytest.mark.slow
def test_compiled_models_are_certified_by_what_is_inside() -> None:
    net, in_place = small_net(), small_net()
    in_place.compile()
    assert_same_certificate(torch.compile(net), net, "OptimizedModule")
    assert_same_certificate(nn.Sequential(torch.compile(net)), net, "OptimizedModule")
    assert_same_certificate(in_place, net, "torch.compile")


def test_a_wrapper_that_does_more_than_call_is_refused() -> None:
    hooked, before, patched = (nn.DataParallel(small_net()) for _ in range(3))
    hooked.register_forward_hook(lambda module, args, out: 5 * out)
    before.register_forward_pre_hook(lambda module, args: (5 * args[0],))
    patched.forward = lambda x: 5 * patched.module(x)  # type: ignore[method-assign]
    for model in (hooked, before, patched, nn.Sequential(hooked)):
        with pytest.raises(UncertifiableError, match="DataParallel: it does more than call"):
            lipschitz_bound(model)
    inside = nn.DataParallel(small_net())
    plain = lipschitz_bound(inside)
    inside.module.register_forward_hook(lambda module, args, out: 5 * out)
    assert lipschitz_bound(inside) == pytest.approx(5 * plain)


# -- orthogonium's activations


def theirs(name: str, *args: float) -> nn.Module:
    activations = pytest.importorskip("orthogonium.layers.custom_activations")
    torch.manual_seed(0)
    return getattr(activations, name)(*args).eval()


def steepest_pair(module: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the largest slope between pairs of images, and between images and themselves a step away."""
    module = copy.deepcopy(module).double()
    pairs = [(x, y), (x, x + 1e-6 * y), (x, -x), (50 * x, 60 * x)]
    slopes = [(module(a) - module(b)).flatten(1).norm(dim=1) / (a - b).flatten(1).norm(dim=1) for a, b in pairs]
    return torch.cat(slopes).max().item()


@pytest.mark.parametrize(
    ("name", "args", "constant"),
    [
        ("Abs", (), 1.0),
        ("MaxMin", (), 1.0),
        ("SoftHuber", (), 1.0),
        ("SoftHuber", (2.0,), 1.0),
        ("HouseHolder", (4,), math.sqrt(0.5)),
        ("HouseHolder_Order_2", (4,), math.sqrt(0.5)),
    ],
)
def test_activations_of_orthogonium_have_their_constant(name: str, args: tuple[float, ...], constant: float) -> None:
    module = theirs(name, *args)
    x, y = torch.randn(2, 200, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert lipschitz_bound(module, torch.rand(1, 4, 2, 2)) == pytest.approx(constant, rel=1e-15)
    for angle in (0.0, 0.3, 2.0, 3.1):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(angle)
        assert constant * 0.9 <= steepest_pair(module, x, y) <= constant * (1 + 1e-9)


@pytest.mark.parametrize(("name", "args"), [("Abs", ()), ("MaxMin", ()), ("SoftHuber", (0.3,)), ("HouseHolder", (4,))])
@pytest.mark.parametrize("arithmetic", ["float64", "float32"])
def test_networks_of_orthogonium_activations_hold_what_is_certified(
    name: str, args: tuple[float, ...], arithmetic: str
) -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 1), theirs(name, *args), nn.Flatten(), nn.Linear(16, 3)).eval()
    x = torch.rand(6, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    labels = net(x).argmax(1)
    certificate = certify(net, x, labels, arithmetic=arithmetic)
    assert min(certificate.radii) > 0
    assert attack(net, x, labels, certificate.radii, getattr(torch, arithmetic), 0).violations == 0
    exact, ran = (copy.deepcopy(net).to(dtype)(x.to(dtype)).double() for dtype in (torch.float64, torch.float32))
    if arithmetic == "float32":
        assert (exact - ran).abs().max().item() <= certificate.rounding


def test_rounding_takes_a_householder_of_order_2_to_zero_and_it_is_refused() -> None:
    module = theirs("HouseHolder_Order_2", 2).double()
    found = 0
    for _ in range(50):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(math.pi * torch.rand(1))
        half = 0.5 * module.theta0.detach()
        z = torch.stack((half.cos(), half.sin())).view(1, 2, 1, 1).repeat(41, 1, 1, 1)
        z[:, 1] *= 1 + torch.arange(-20, 21).double().view(-1, 1, 1) * 2.0**-52
        found += bool((module(z).flatten(1).norm(dim=1) == 0).any())  # 1/√2 everywhere in real arithmetic
    assert found
    net, x = nn.Sequential(module, nn.Flatten()), torch.rand(2, 2, 1, 1)
    with pytest.raises(UncertifiableError, match=r"0 \(HouseHolder_Order_2\): an angle that rounding takes"):
        certify(net, x, torch.zeros(2, dtype=torch.long))


def test_activations_of_orthogonium_are_refused_where_images_would_meet_or_code_differs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.rand(4, 4, 2, 2)
    with pytest.raises(UncertifiableError, match="images would meet"):
        lipschitz_bound(theirs("MaxMin", 0), x)
    with pytest.raises(UncertifiableError, match="pairs"):
        lipschitz_bound(theirs("HouseHolder", 4), torch.rand(4, 4))
    with pytest.raises(UncertifiableError, match="delta"):
        lipschitz_bound(theirs("SoftHuber", 0.0), x)
    module = theirs("MaxMin")
    assert lipschitz_bound(module, x) == 1.0
    original = type(module).forward
    monkeypatch.setattr(type(module), "forward", lambda self, z: 3 * original(self, z))
    assert lipschitz_bound(module, x) >= 3.0


class Stated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = CayleyLinear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).relu()


class OfItself(Stated):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).relu()

    def lipschitz_constant(self) -> float:
        return 1.0


def steeper(layer: CayleyLinear, x: Tensor) -> Tensor:
    return 5 * type(layer).forward(layer, x)


def by_a_hook_everywhere(block: Stated) -> Any:
    times = lambda module, given, made: 5 * made if isinstance(module, CayleyLinear) else None  # noqa: E731
    return nn.modules.module.register_module_forward_hook(times)


STEEPER: list[Callable[[Stated], Any]] = [
    lambda block: block.layer.register_forward_hook(lambda module, given, made: 5 * made),
    lambda block: block.layer.register_forward_pre_hook(lambda module, given: 5 * given[0]),
    lambda block: setattr(block.layer, "forward", MethodType(steeper, block.layer)),
    by_a_hook_everywhere,
]


@patch.dict(RULES)
@pytest.mark.parametrize("cls", [Stated, OfItself])
@pytest.mark.parametrize("change", STEEPER)
def test_a_stated_constant_does_not_cover_what_is_done_to_the_modules_inside(
    cls: type[Stated], change: Callable[[Stated], Any]
) -> None:
    if cls is Stated:
        register_lipschitz(Stated)(lambda module: 1.0)
    torch.manual_seed(0)
    net, x = cls().eval().double(), torch.rand(8, 4, dtype=torch.float64)
    assert lipschitz_bound(net, x) == 1.0
    handle = change(net)
    try:
        slope = ((net(x) - net(x + 0.1)).norm(dim=1) / 0.2).max().item()
        assert 1.5 < slope <= lipschitz_bound(net, x) * (1 + 1e-12) == pytest.approx(5.0)
        whole = nn.Sequential(net, nn.Linear(4, 2).double())
        assert certify(whole, x, torch.zeros(8, dtype=torch.long)).lipschitz > 4.99
    finally:
        if handle is not None:
            handle.remove()
