"""The bound follows the model as it runs: every way in which 0.1.0 counted something else is counted or refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espalier.certify import UncertifiableError, certify, lipschitz_bound
from espalier.errors import EspalierError
from espalier.nn import (
    CayleyConv2d,
    CayleyConvTranspose2d,
    CayleyLinear,
    ConvexSum,
    GroupSort,
    MaxMin,
    Normalize,
    ScaledAvgPool2d,
)
from espalier.nn.lipschitz import activations


class Runs(nn.Module):
    """A forward pass given as a function of x and some modules."""

    def __init__(self, function: Callable[..., Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.parts)


def multiple(factor: float, size: int = 4) -> nn.Linear:
    layer = nn.Linear(size, size, bias=False)
    with torch.no_grad():
        layer.weight.copy_(factor * torch.eye(size))
    return layer


def steepest(net: nn.Module, x: Tensor) -> float:
    """Return the largest singular value of the float64 Jacobian at every image of x."""
    net, found = copy.deepcopy(net).double(), 0.0
    for image in x.double():
        jacobian = torch.autograd.functional.jacobian(lambda one: net(one[None].clone())[0].flatten(), image)
        found = max(found, torch.linalg.svdvals(jacobian.reshape(-1, image.numel())).max().item())
    return found


def test_a_module_used_twice_counts_twice() -> None:
    a, head = multiple(3.0), nn.Linear(4, 2)
    body = nn.Sequential(nn.Flatten(), a, nn.ReLU(), a, nn.ReLU(), a)
    assert lipschitz_bound(body) == pytest.approx(27.0)
    net, x = nn.Sequential(body, head), torch.rand(8, 1, 2, 2)
    certificate = certify(net, x, net(x).argmax(1))
    assert certificate.lipschitz == pytest.approx(27.0)
    # The net is linear on these images: the nearest border is where it is.
    scores, distance = net(x).double(), (head.weight[0] - head.weight[1]).double().norm()
    exact = (scores[:, 0] - scores[:, 1]).abs() / (27 * distance)
    assert torch.allclose(torch.tensor(certificate.radii, dtype=torch.float64), exact, rtol=1e-4)


def test_normalising_a_grey_image_with_three_means_is_refused_and_by_hand_counted() -> None:
    with pytest.raises(EspalierError, match="3 channels"):
        lipschitz_bound(Normalize([0.1, 0.2, 0.3]), torch.rand(2, 1, 4, 4))
    by_hand = Runs(lambda x: x - torch.tensor([0.1, 0.2, 0.3], dtype=x.dtype).view(3, 1, 1))
    assert lipschitz_bound(by_hand, torch.rand(2, 1, 4, 4)) == pytest.approx(math.sqrt(3))
    assert lipschitz_bound(by_hand, torch.rand(2, 3, 4, 4)) == 1.0


def test_convex_sum_refuses_broadcasting_and_counts_in_place_branches() -> None:
    x = torch.rand(3, 4)
    with pytest.raises(EspalierError, match="keep the shape"):
        lipschitz_bound(ConvexSum(nn.Linear(4, 1)), x)
    in_place = ConvexSum(nn.LeakyReLU(5.0, inplace=True))
    assert lipschitz_bound(in_place, x) == pytest.approx(5.0)
    with pytest.raises(UncertifiableError, match="in place"):
        lipschitz_bound(in_place)
    broadcast = Runs(lambda x, f: torch.lerp(x, f(x), 0.5), nn.Linear(4, 1))
    assert steepest(broadcast, x) <= lipschitz_bound(broadcast, x)


IN_PLACE: list[tuple[str, Callable[[Tensor], Tensor], float]] = [
    ("a sum with itself", lambda x: x.clone().add_(x), 2.0),
    ("before a residual", lambda x: (y := x * 1.0).mul_(3.0) + y, 6.0),
    ("by an operator", lambda x: _augmented(x), 3.0),
    ("an activation", lambda x: F.leaky_relu(y := x * 1.0, 4.0, inplace=True) + y, 8.0),
]


def _augmented(x: Tensor) -> Tensor:
    y = 2 * x
    y += x
    return y


@pytest.mark.parametrize(("words", "function", "constant"), IN_PLACE, ids=[case[0] for case in IN_PLACE])
def test_operations_in_place_change_what_they_change(
    words: str, function: Callable[[Tensor], Tensor], constant: float
) -> None:
    x = -torch.rand(2, 3)
    assert lipschitz_bound(Runs(function), x) == pytest.approx(constant)
    assert steepest(Runs(function), x) == pytest.approx(constant)


def test_numbers_changed_through_another_tensor_are_refused() -> None:
    def through_a_view(x: Tensor) -> Tensor:
        y = x * 1.0
        y.view(-1, 3).mul_(100.0)
        return y

    with pytest.raises(UncertifiableError, match="changed in place through another tensor"):
        lipschitz_bound(Runs(through_a_view), torch.rand(2, 3))
    with pytest.raises(UncertifiableError, match="changed in place through another tensor"):
        lipschitz_bound(Runs(lambda x: (x.data.mul_(3), x)[1]), torch.rand(2, 3))
    with pytest.raises(UncertifiableError, match="differs from image to image"):
        lipschitz_bound(Runs(lambda x: torch.zeros(2, 3).double().add_(x)), torch.rand(2, 3))


def test_the_caller_s_images_are_left_alone() -> None:
    net, x = nn.Sequential(nn.Hardtanh(0.2, 0.5, inplace=True), nn.Linear(3, 2)).double(), torch.rand(4, 3).double()
    before = x.clone()
    certify(net, x, torch.zeros(4, dtype=torch.long))
    assert torch.equal(x, before)


class TenTimes(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return 10 * super()._conv_forward(x, weight, bias)


class Called(nn.Linear):
    def __call__(self, x: Tensor) -> Tensor:
        return 10 * super().__call__(x)


def patched(layer: nn.Module, name: str, function: Callable[..., Tensor]) -> nn.Module:
    setattr(layer, name, MethodType(function, layer))
    return layer


def test_overridden_and_patched_methods_are_counted() -> None:
    torch.manual_seed(0)
    conv = TenTimes(1, 1, 3, padding_mode="circular", padding=1).eval()
    x = torch.rand(2, 1, 4, 4)
    assert steepest(conv, x) <= lipschitz_bound(conv, x)
    called = Called(3, 3)
    assert lipschitz_bound(called) == pytest.approx(steepest(called, torch.rand(1, 3)))
    plain = patched(nn.Conv2d(1, 1, 1), "_conv_forward", lambda self, x, w, b: 7 * x)
    assert lipschitz_bound(plain) == 7.0


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: patched(MaxMin(), "forward", lambda self, x: 9 * x), (4, 2, 2)),
        (lambda: patched(GroupSort(2), "forward", lambda self, x: 9 * x), (4, 2, 2)),
        (lambda: patched(CayleyConv2d(4, 4, 3), "_isometry", lambda self, x, *_: 9 * x), (4, 4, 4)),
        (lambda: patched(CayleyConv2d(4, 4, 1), "_pointwise", lambda self, x, bias: 9 * x), (4, 4, 4)),
        (lambda: patched(CayleyConvTranspose2d(4, 4, 3), "forward", lambda self, x: 9 * x), (4, 4, 4)),
        (lambda: patched(CayleyLinear(4, 4), "forward", lambda self, x: 9 * x), (4,)),
        (lambda: patched(ScaledAvgPool2d(2), "forward", lambda self, x: 9 * x), (4, 4, 4)),
        (lambda: patched(ConvexSum(nn.Identity()), "forward", lambda self, x: 9 * x), (4,)),
        (lambda: patched(Normalize(0.5), "forward", lambda self, x: 9 * x), (4, 2, 2)),
        (lambda: patched(nn.BatchNorm2d(4), "forward", lambda self, x: 9 * x), (4, 2, 2)),
    ],
)
def test_patched_layers_are_bounded_as_patched(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    assert lipschitz_bound(make().eval(), torch.rand(2, *shape)) == 9.0


def test_a_class_patched_after_import_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(2, 4)
    monkeypatch.setattr(MaxMin, "forward", lambda self, x: 5 * x)
    assert lipschitz_bound(MaxMin(), x) == 5.0
    monkeypatch.undo()
    assert lipschitz_bound(MaxMin(), x) == 1.0
    honest = activations._SortPairs.forward

    def steeper(ctx: object, x: Tensor) -> Tensor:
        return 5 * honest(ctx, x)

    monkeypatch.setattr(activations._SortPairs, "forward", staticmethod(steeper))
    with pytest.raises(UncertifiableError, match="MaxMin"):
        lipschitz_bound(MaxMin(), x)


KNOWN: list[tuple[str, Callable[..., Tensor], float]] = [
    ("weighted residual", lambda x, f: 0.5 * x - 0.25 * f(x), 1.25),
    ("flatten and pad", lambda x, f: F.pad(f(x).flatten(1), (1, 2)), 3.0),
    ("concatenation", lambda x, f: torch.cat((x, f(x)), 1), math.sqrt(10)),
    ("stack and maximum", lambda x, f: torch.maximum(x, x.flip(1)), math.sqrt(2)),
    ("functional reuse", lambda x, f: F.linear(F.linear(x, f.weight), f.weight), 9.0),
    ("slices", lambda x, f: f(x)[:, 1:], 3.0),
    ("average", lambda x, f: x.mean(1, keepdim=True), 0.5),
    ("largest of pairs", lambda x, f: f(x).view(-1, 2, 2).max(1)[0], 3.0),
    ("smallest of pairs", lambda x, f: torch.min(f(x).view(-1, 2, 2), dim=-1, keepdim=True).values.flatten(1), 3.0),
]


@pytest.mark.parametrize(("words", "function", "constant"), KNOWN, ids=[case[0] for case in KNOWN])
def test_a_forward_pass_of_known_operations_is_certified(
    words: str, function: Callable[..., Tensor], constant: float
) -> None:
    net = Runs(function, multiple(3.0))
    assert lipschitz_bound(net, torch.rand(2, 4)) == pytest.approx(constant)
    assert steepest(net, torch.rand(2, 4)) <= constant * (1 + 1e-12)


REFUSED: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    ("__bool__|sum", lambda x: x if x.sum() > 0 else 9 * x),
    ("gt", lambda x: x * (x > 0.5)),
    ("item", lambda x: x * x.amax(1).item()),
    ("where", lambda x: torch.where(torch.ones(3).bool(), x, 9 * x)),
    ("argmax", lambda x: x[:, x.argmax()]),
    ("softmax", lambda x: x.softmax(1)),
    ("two values", lambda x: x * x),
    ("images would meet", lambda x: x - x.mean(0, keepdim=True)),
    ("images would meet", lambda x: x.flip(0)),
    ("images would meet", lambda x: x.max(0)[0] + x),
    ("NoneType has no rule", lambda x: x.max() + x),
    ("no rule|NoneType|depends on the image", lambda x: x.gather(1, x.max(1, keepdim=True)[1])),
    ("images would meet", lambda x: x.transpose(0, 1)),
    ("images would meet", lambda x: x.reshape(1, -1)),
    ("part of the batch", lambda x: x[:1]),
    ("differs from image to image", lambda x: x + torch.rand(2, 3)),
    ("half|float16", lambda x: x.half() + 1),
    ("numpy", lambda x: torch.from_numpy(x.numpy())),
    ("rand_like", lambda x: x + torch.rand_like(x)),
    ("rtruediv|rdiv", lambda x: 1 / x),
    ("neither zero nor denormal", lambda x: x / torch.tensor([1.0, 0.0, 2.0])),
]


@pytest.mark.parametrize(("words", "function"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_what_has_no_rule_is_refused_by_name(words: str, function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(UncertifiableError, match=words) as refusal:
        lipschitz_bound(nn.Sequential(nn.Identity(), Runs(function)), torch.rand(2, 3))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("example", [None, torch.rand(2, 3)], ids=["any size", "one size"])
@pytest.mark.parametrize("convert", [
    lambda x: x.type(torch.LongTensor), lambda x: x.to(torch.int64), lambda x: x.to(dtype=torch.uint8),
    lambda x: x.type(dtype=torch.BoolTensor), lambda x: x.type(torch.int32),
])  # fmt: skip
def test_a_conversion_that_cuts_numbers_is_refused_however_it_is_written(
    convert: Callable[[Tensor], Tensor], example: Tensor | None
) -> None:
    net = Runs(lambda x: convert(x).to(torch.float64))
    near, far = torch.full((1, 3), 1 - 1e-9, dtype=torch.float64), torch.ones(1, 3, dtype=torch.float64)
    if convert(far).dtype != torch.bool:
        assert (net(far) - net(near)).norm() > 1e8 * (far - near).norm()
    with pytest.raises(UncertifiableError, match=r"step function|is not known"):
        lipschitz_bound(net, example)


def test_random_and_stateful_networks_are_refused() -> None:
    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.rand(self.out_features)

    class Counting(nn.Linear):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.calls * super().forward(x)

    class Sniffing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if type(x) is not Tensor else 100 * super().forward(x)

    class Pair(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return (y, y) if type(x) is Tensor else y  # type: ignore[return-value]

    for net in (Noisy(3, 2), Counting(3, 2), Sniffing(3, 2), Pair(3, 2)):
        with pytest.raises(UncertifiableError, match=r"run again|on plain tensors"):
            certify(net, torch.rand(4, 3), torch.zeros(4, dtype=torch.long))


def test_an_operator_that_rounding_left_far_from_orthogonal_is_measured() -> None:
    torch.manual_seed(0)
    conv = CayleyConv2d(6, 8, 3).double().eval()
    with torch.no_grad():
        conv.weight.copy_(conv.weight[:1].expand_as(conv.weight))  # rank 1: what should cancel is lost in α²
        conv.alpha.fill_(1e9)
    x = torch.rand(1, 6, 8, 8).double()
    try:
        exact = steepest(conv, x)
    except torch.linalg.LinAlgError:  # some libraries invert by pivoting: singular as it is rounded, or infinite
        with pytest.raises(UncertifiableError, match=r"forward pass fails|its constant is inf"):
            lipschitz_bound(conv, x)
    else:
        assert exact > 2
        assert exact <= lipschitz_bound(conv, x)
    with pytest.raises(UncertifiableError, match="give an example"):
        lipschitz_bound(conv)
    with torch.no_grad():
        conv.alpha.fill_(1e3)
    assert lipschitz_bound(conv) == 1.0
    assert lipschitz_bound(conv, x) < 1 + 1e-6
