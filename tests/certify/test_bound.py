"""The Lipschitz bound against the largest singular value of the float64 Jacobian, and against refusals."""

from __future__ import annotations

import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from espalier.certify import UncertifiableError, certify, lipschitz_bound, register_lipschitz
from espalier.certify.layers import RULES
from espalier.errors import EspalierError
from espalier.models.convmixer import Residual
from espalier.nn.lipschitz.activations import MaxMin
from espalier.nn.lipschitz.constant import spectral_norm
from espalier.nn.lipschitz.normalisation import Normalize
from espalier.nn.lipschitz.pooling import InvertibleDownsampling, ScaledAvgPool2d
from espalier.nn.lipschitz.residual import ConvexSum
from espalier.nn.orthogonal.linear import CayleyLinear


def steepest(net: nn.Module, shape: tuple[int, ...], points: int = 4, scale: float = 1.0) -> float:
    """Return the largest singular value of the float64 Jacobian over random points."""
    generator = torch.Generator().manual_seed(1)
    largest = 0.0
    for _ in range(points):
        x = scale * torch.randn(shape, dtype=torch.float64, generator=generator)
        jacobian = torch.autograd.functional.jacobian(lambda one: net(one[None])[0].flatten(), x)
        largest = max(largest, torch.linalg.svdvals(jacobian.reshape(-1, x.numel())).max().item())
    return largest


def on_a_large_grid(net: nn.Module, slope_at: Tensor) -> float:
    x = slope_at.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(net(x).sum(), x)
    return gradient.abs().max().item()


@pytest.mark.parametrize(
    "activation",
    [
        nn.ReLU(), nn.ReLU6(), nn.Hardtanh(), nn.Tanh(), nn.Sigmoid(), nn.Softsign(), nn.LogSigmoid(),
        nn.Softshrink(), nn.Tanhshrink(), nn.LeakyReLU(0.2), nn.LeakyReLU(-1.5), nn.PReLU(3, 0.3), nn.PReLU(1, 2.0),
        nn.ELU(), nn.ELU(1.7), nn.SELU(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Mish(),
    ],
    ids=str,
)  # fmt: skip
def test_activations_stay_below_their_constant_and_come_close(activation: nn.Module) -> None:
    grid = torch.linspace(-12, 12, 24_000, dtype=torch.float64)
    grid = grid.view(-1, 3) if isinstance(activation, nn.PReLU) and activation.num_parameters == 3 else grid
    slope = on_a_large_grid(activation.double(), grid)
    assert slope <= lipschitz_bound(activation) * (1 + 1e-12)
    assert lipschitz_bound(activation) <= max(1.0, slope) * 1.002


@settings(max_examples=25, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    padding=st.integers(0, 2),
    groups=st.sampled_from([1, 2]),
    mode=st.sampled_from(["zeros", "circular", "reflect", "replicate"]),
    size=st.tuples(st.integers(5, 7), st.integers(5, 7)),
)
def test_a_plain_convolution_is_bounded(
    kernel: tuple[int, int], stride: int, dilation: int, padding: int, groups: int, mode: str, size: tuple[int, int]
) -> None:
    if any(dilation * (k - 1) + 1 > n + 2 * padding for k, n in zip(kernel, size, strict=True)):
        return
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 4, kernel, stride, padding, dilation, groups, padding_mode=mode).double()
    if mode == "circular" and any(2 * padding > dilation * (k - 1) for k in kernel):
        with pytest.raises(UncertifiableError, match="circular padding"):
            lipschitz_bound(conv)
        return
    assert steepest(conv, (2, *size), points=1) <= lipschitz_bound(conv)


def test_a_patch_embedding_and_a_1x1_convolution_are_bounded_tightly() -> None:
    torch.manual_seed(0)
    for conv in (nn.Conv2d(3, 5, 2, stride=2).double(), nn.Conv2d(3, 5, 1).double()):
        assert lipschitz_bound(conv) == pytest.approx(steepest(conv, (3, 4, 4), points=1), rel=1e-9)


def test_a_circular_stride_that_does_not_divide_the_image_is_still_bounded() -> None:
    # Side 3, stride 2: pixel 0 lies in two windows of two taps though ⌈2/2⌉ is 1.
    conv = nn.Conv1d(1, 1, 2, stride=2, padding="valid", padding_mode="circular", bias=False).double()
    conv._reversed_padding_repeated_twice = [0, 1]
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([[[1.0, -1.0]]]))
    seen = nn.functional.conv1d(nn.functional.pad(torch.eye(3).double()[:, None], (0, 1), mode="circular"),
                                conv.weight, stride=2)  # fmt: skip
    assert torch.linalg.svdvals(seen[:, 0]).max().item() > math.sqrt(2) + 1e-6
    assert torch.linalg.svdvals(seen[:, 0]).max().item() <= lipschitz_bound(conv)


@settings(max_examples=25, deadline=None)
@given(kernel=st.integers(1, 4), stride=st.integers(1, 4), padding=st.integers(0, 2), size=st.integers(5, 7))
def test_average_pooling_is_bounded_with_and_without_overlap(kernel: int, stride: int, padding: int, size: int) -> None:
    if padding > kernel // 2:
        return
    pool = nn.AvgPool2d(kernel, stride, padding)
    exact = steepest(pool, (1, size, size), points=1)
    assert exact <= lipschitz_bound(pool) * (1 + 1e-12)
    if stride >= kernel and not padding:
        assert lipschitz_bound(pool) == pytest.approx(exact, rel=1e-12)


@settings(max_examples=25, deadline=None)
@given(kernel=st.integers(1, 4), stride=st.integers(1, 4), dilation=st.integers(1, 2), seed=st.integers(0, 99))
def test_max_pooling_is_bounded_on_images_whose_peaks_are_shared(
    kernel: int, stride: int, dilation: int, seed: int
) -> None:
    pool = nn.MaxPool2d(kernel, stride, dilation=dilation)
    x = torch.randn(1, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x[0, 0, 4, 4] = 10.0
    jacobian = torch.autograd.functional.jacobian(lambda one: pool(one).flatten(), x).reshape(-1, 64)
    assert torch.linalg.svdvals(jacobian).max().item() <= lipschitz_bound(pool) * (1 + 1e-12)


def test_overlapping_max_pooling_reaches_its_constant() -> None:
    pool, x = nn.MaxPool2d(3, 1), torch.zeros(1, 1, 5, 5, dtype=torch.float64)
    x[0, 0, 2, 2] = 1.0
    jacobian = torch.autograd.functional.jacobian(lambda one: pool(one).flatten(), x).reshape(-1, 25)
    assert torch.linalg.svdvals(jacobian).max().item() == pytest.approx(3.0)
    assert lipschitz_bound(pool) == 3.0
    assert lipschitz_bound(nn.MaxPool2d(2)) == 1.0


@pytest.mark.parametrize(
    "pad",
    [
        nn.ReflectionPad2d(2), nn.ReflectionPad2d((2, 0, 0, 1)), nn.ReplicationPad2d(2),
        nn.ReplicationPad2d((0, 3, 1, 0)), nn.CircularPad2d(2), nn.CircularPad2d((1, 0, 0, 0)),
        nn.ZeroPad2d(2), nn.ReflectionPad1d((1, 2)),
    ],
    ids=str,
)  # fmt: skip
def test_padding_is_bounded_and_only_zeros_are_free(pad: nn.Module) -> None:
    shape = (1, 4) if "1d" in type(pad).__name__ else (1, 3, 4)
    exact = steepest(pad, shape, points=1)
    assert exact <= lipschitz_bound(pad) * (1 + 1e-12)
    assert (exact > 1 + 1e-9) == (not isinstance(pad, nn.ZeroPad2d))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), depth=st.integers(1, 3))
def test_a_random_net_is_never_steeper_than_its_bound(seed: int, depth: int) -> None:
    torch.manual_seed(seed)
    layers: list[nn.Module] = [Normalize(0.3, 0.4), InvertibleDownsampling(2)]
    for _ in range(depth):
        inner = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), MaxMin())
        inner[1].running_var.uniform_(0.1, 2)
        layers += [ConvexSum(inner, float(torch.rand(()) * 0.9 + 0.05)), nn.LeakyReLU(0.3)]
    layers += [ScaledAvgPool2d(2), nn.Flatten(), nn.Dropout(0.5), nn.Linear(4, 3)]
    net = nn.Sequential(*layers).double().eval()
    assert steepest(net, (1, 4, 4)) <= lipschitz_bound(net)


def test_an_orthogonal_net_is_bounded_exactly() -> None:
    net = nn.Sequential(*(nn.utils.parametrizations.orthogonal(nn.Linear(6, 6)) for _ in range(3)), MaxMin()).double()
    assert lipschitz_bound(net) == pytest.approx(1.0, abs=1e-6)
    assert lipschitz_bound(net) >= steepest(net, (6,)) - 1e-12


def test_batch_norm_is_folded_in_at_evaluation() -> None:
    norm = nn.BatchNorm2d(2).double().eval()
    norm.running_var.copy_(torch.tensor([0.25, 4.0]))
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([-3.0, 1.0]))
    assert lipschitz_bound(norm) == pytest.approx(steepest(norm, (2, 2, 2)), rel=1e-12)


# -- what must be refused


class Squaring(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


class Sine(nn.Module):
    """2·sin x, by operations without a rule."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * torch.sign(x) * torch.square(torch.sin(x)).sqrt()


class SteeperMaxMin(MaxMin):
    """Inherits MaxMin's statement, not its forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


class Rectified(nn.Module):
    """Branches on the values of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x if bool((x > 0).all()) else 100 * x


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (Squaring(), "product or quotient of two values"),
        (SteeperMaxMin(), "SteeperMaxMin"),
        (Rectified(), "looks at the numbers"),
        (nn.Dropout(0.1), "eval()"),
        (nn.BatchNorm2d(2), "eval()"),
        (nn.LayerNorm(2), "LayerNorm"),
        (nn.AvgPool2d(2, ceil_mode=True), "fewer pixels"),
        (nn.AvgPool2d(3, padding=1, count_include_pad=False), "fewer pixels"),
        (nn.MaxPool2d(2, return_indices=True), "indices"),
        (nn.AdaptiveAvgPool2d(2), "image size"),
        (nn.Softplus(), "Softplus"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_is_not_known_is_refused_by_its_path(module: nn.Module, words: str) -> None:
    net = nn.Sequential(nn.Identity(), ConvexSum(nn.Sequential(nn.Identity(), module)))
    net.train()
    with pytest.raises(UncertifiableError, match=r"1\.fn\.1") as refusal:
        lipschitz_bound(net)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_training_batch_norm_without_statistics_is_refused_at_evaluation_too() -> None:
    with pytest.raises(UncertifiableError, match="mixes the images"):
        lipschitz_bound(nn.BatchNorm2d(2, track_running_stats=False).eval())


def test_hooks_and_patched_forwards_are_counted() -> None:
    hooked, patched, around = nn.Identity(), nn.Identity(), nn.Sequential(nn.Identity())
    hooked.register_forward_hook(lambda module, args, out: 5 * out)
    patched.forward = lambda x: 5 * x  # type: ignore[method-assign]
    around.register_forward_pre_hook(lambda module, args: (5 * args[0],))
    for module in (hooked, patched, around):
        assert lipschitz_bound(nn.Sequential(module)) == 5.0
    peeking = nn.Identity()
    peeking.register_forward_hook(lambda module, args, out: out * out.sum())
    with pytest.raises(UncertifiableError, match="images would meet"):
        lipschitz_bound(nn.Sequential(peeking), torch.rand(2, 3))


def test_weights_that_are_not_finite_are_refused() -> None:
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight[0, 0] = float("nan")
    with pytest.raises(UncertifiableError, match="finite"):
        lipschitz_bound(nn.Sequential(layer))


@patch.dict(RULES)
def test_registration_opens_the_bound_to_users() -> None:
    net = nn.Sequential(Sine(), Residual(nn.Linear(3, 3)))
    with pytest.raises(UncertifiableError, match="Sine"):
        lipschitz_bound(net)

    @register_lipschitz(Sine)
    def sine(module: Sine) -> float:
        return 2.0

    @register_lipschitz(Residual)
    def residual(module: Residual) -> float:
        return 1.0 + lipschitz_bound(module.fn)

    assert lipschitz_bound(net) == pytest.approx(2 * (1 + spectral_norm(net[1].fn.weight)))
    images, labels = torch.rand(4, 3), torch.zeros(4, dtype=torch.long)
    with pytest.raises(
        UncertifiableError, match=r"0 \(Sine\): nothing is known about torch.sign.*its rounding is not: see register"
    ):
        certify(net, images, labels)  # a constant says nothing about rounding

    @register_lipschitz(Sine, rounding=lambda module, unit: (8 * unit, 0.0))
    def rounded(module: Sine) -> float:
        return 2.0

    stated = certify(net, images, net(images).argmax(1))
    assert stated.lipschitz == pytest.approx(2.0 * (1 + spectral_norm(net[1].fn.weight)))
    assert max(stated.radii) > 0

    @register_lipschitz(Sine)
    def undecided(module: Sine) -> float:
        raise UncertifiableError("it cannot be said today")

    with pytest.raises(UncertifiableError, match=r"0 \(Sine\): it cannot be said today"):
        lipschitz_bound(net)


class States(nn.Module):
    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        return self.slope * x.exp().sin()

    def lipschitz_constant(self) -> float:
        return self.slope


def test_a_statement_holds_whatever_else_bears_the_name_of_an_attribute(monkeypatch: pytest.MonkeyPatch) -> None:
    for slope in (2.0, 3.0):
        monkeypatch.setitem(globals(), "slope", slope)  # as this loop would at the top of a script
        assert lipschitz_bound(States(slope)) == slope


@patch.dict(RULES)
def test_a_registration_replaces_a_rule_of_ours() -> None:
    net = nn.Sequential(MaxMin())
    register_lipschitz(MaxMin)(lambda module: 3.0)
    assert lipschitz_bound(net) == 3.0


class Catches(nn.Module):
    """Goes another way where its layer refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = CayleyLinear(4, 4)
        nn.init.constant_(self.layer.alpha, 1e5)

    def forward(self, x: Tensor) -> Tensor:
        try:
            return 1000 * self.layer(x)
        except EspalierError:
            return x


def test_a_network_that_catches_what_the_rule_of_a_layer_refuses_is_refused() -> None:
    with pytest.raises(UncertifiableError, match="goes on after an operation that failed"):
        lipschitz_bound(Catches().eval())


@pytest.mark.parametrize(
    ("padding", "constant"),
    [(nn.CircularPad1d(1), 3**0.5), (nn.CircularPad2d(1), 3.0), (nn.CircularPad3d((1, 0, 0, 0, 0, 1)), 2.0)],
)
def test_circular_padding_counts_every_axis_once(padding: nn.Module, constant: float) -> None:
    assert lipschitz_bound(padding) == pytest.approx(constant)
