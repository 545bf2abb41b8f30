"""Lipschitz parts against the singular values of their own Jacobians, in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from espalier.errors import EspalierError
from espalier.nn.lipschitz.activations import Abs, GroupSort, Householder, MaxMin
from espalier.nn.lipschitz.constant import kernel_norm, spectral_norm
from espalier.nn.lipschitz.normalisation import BatchCentering, Normalize, NormalizedLinear
from espalier.nn.lipschitz.pooling import InvertibleDownsampling, L2Pool2d, ScaledAvgPool2d
from espalier.nn.lipschitz.residual import ConvexSum, LinearResidual


def jacobian_norm(module: nn.Module, x: Tensor) -> float:
    """Return the largest singular value of the Jacobian at ``x``, without a batch axis, in float64."""
    jacobian = torch.autograd.functional.jacobian(lambda one: module(one[None])[0].flatten(), x)
    return torch.linalg.svdvals(jacobian.reshape(-1, x.numel())).max().item()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_max_min_sorts_pairs_of_channels() -> None:
    x = torch.tensor([[1.0, 5.0, 3.0, 2.0]])
    assert MaxMin()(x).tolist() == [[3.0, 5.0, 1.0, 2.0]]


def test_max_min_sends_gradients_back_where_numbers_came_from_and_keeps_the_layout() -> None:
    x = draw(3, 4, 5, 2).permute(2, 1, 3, 0).requires_grad_()
    a, b = x.chunk(2, dim=1)
    plain = torch.cat((torch.maximum(a, b), torch.minimum(a, b)), dim=1)
    weights = draw(5, 4, 2, 3, seed=1)
    ours = MaxMin()(x)
    assert torch.equal(ours, plain)
    assert ours.stride() == x.stride()
    assert torch.equal(*(torch.autograd.grad(y, x, weights)[0] for y in (ours, plain)))
    assert torch.autograd.gradgradcheck(MaxMin(), (x,))
    equal = torch.ones(1, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(MaxMin()(equal), equal, torch.arange(4.0)[None])
    assert gradient.tolist() == [[0, 1, 2, 3]]


@settings(max_examples=20, deadline=None)
@given(size=st.integers(2, 5), groups=st.integers(1, 4), spatial=st.sampled_from([(), (3,), (2, 3)]))
def test_group_sort_is_a_sort_of_every_group(size: int, groups: int, spatial: tuple[int, ...]) -> None:
    x = draw(2, size * groups, *spatial)
    y = GroupSort(size)(x)
    for j in range(groups):
        members = list(range(j, size * groups, groups))
        assert torch.equal(y[:, members], x[:, members].sort(dim=1, descending=True).values)
    if size == 2:
        assert torch.equal(y, MaxMin()(x))
    # A permutation of the channels at every pixel: norms stay what they are.
    assert torch.equal(y.sort(dim=1).values, x.sort(dim=1).values)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (MaxMin(), (4, 3, 2)),
        (GroupSort(3), (6, 2, 2)),
        (Abs(), (3, 2, 2)),
        (Householder(4).double(), (4, 3, 2)),
        (L2Pool2d(1), (2, 4, 6)),
        (L2Pool2d(2), (2, 4, 6)),
        (InvertibleDownsampling(2), (2, 4, 6)),
        (ScaledAvgPool2d(1), (2, 4, 6)),
        (ScaledAvgPool2d(2), (2, 4, 6)),
        (ScaledAvgPool2d(3), (1, 7, 6)),
        (ScaledAvgPool2d(), (3, 4, 5)),
    ],
    ids=str,
)
def test_the_stated_constant_is_exact(module: nn.Module, shape: tuple[int, ...]) -> None:
    stated = module.lipschitz_constant()
    assert jacobian_norm(module, draw(*shape)) == pytest.approx(stated, abs=1e-12)


def test_plain_average_pooling_loses_the_factor_that_scaled_pooling_keeps() -> None:
    x = draw(2, 4, 4)
    assert jacobian_norm(nn.AvgPool2d(2), x) == pytest.approx(0.5, abs=1e-12)
    assert torch.allclose(ScaledAvgPool2d(2)(x[None]), 2 * nn.AvgPool2d(2)(x[None]))


@settings(max_examples=20, deadline=None)
@given(coefficient=st.floats(0.01, 0.99), gain=st.floats(0.1, 3.0))
def test_a_convex_sum_reaches_its_constant_and_no_more(coefficient: float, gain: float) -> None:
    # f = gain·x: the combination is a multiple of the identity, so its constant is known exactly.
    inner = nn.Linear(3, 3, bias=False).double()
    with torch.no_grad():
        inner.weight.copy_(gain * torch.eye(3, dtype=torch.float64))
    module = ConvexSum(inner, coefficient).double()
    stated = module.lipschitz_constant_from(lambda child: gain)
    assert stated == pytest.approx(1 - coefficient + coefficient * gain, rel=1e-6)
    assert jacobian_norm(module, draw(3)) == pytest.approx(stated, rel=1e-9)


def test_the_coefficient_of_a_convex_sum_learns_and_stays_between_0_and_1() -> None:
    module, x = ConvexSum(nn.ReLU(), 0.3), -torch.ones(1, 2)
    module(x).sum().backward()
    # ∂/∂logit of −2(1 − c) is 2c(1 − c).
    assert module.logit.grad.item() == pytest.approx(2 * 0.3 * 0.7, rel=1e-6)
    for extreme in (-200.0, 200.0):
        with torch.no_grad():
            module.logit.fill_(extreme)
        assert module.lipschitz_constant_from(lambda child: 3.0) == pytest.approx(1.0 if extreme < 0 else 3.0)


def test_normalised_rows_have_unit_norm_whatever_the_weights_are() -> None:
    layer = NormalizedLinear(5, 3).double()
    with torch.no_grad():
        layer.weight.mul_(torch.tensor([[100.0], [1.0], [1e-3]]))
    jacobian = torch.autograd.functional.jacobian(layer, draw(5))
    assert torch.allclose(jacobian.norm(dim=1), torch.ones(3, dtype=torch.float64))
    assert layer.lipschitz_constant() == pytest.approx(torch.linalg.svdvals(jacobian).max().item(), rel=1e-12)
    assert layer.lipschitz_constant() >= torch.linalg.svdvals(jacobian).max().item()


@settings(max_examples=20, deadline=None)
@given(theta=st.floats(-7, 7), seed=st.integers(0, 99))
def test_householder_reflects_one_side_of_its_line_and_keeps_the_other(theta: float, seed: int) -> None:
    module = Householder(2).double()
    with torch.no_grad():
        module.theta.fill_(theta)
    (z,) = draw(1, 2, seed=seed)
    normal = torch.tensor([math.sin(theta / 2), -math.cos(theta / 2)], dtype=torch.float64)
    side = (normal @ z).item()
    expected = z - 2 * side * normal if side > 0 else z
    torch.testing.assert_close(module(z[None])[0], expected)
    assert module(z[None]).norm().item() == pytest.approx(z.norm().item(), rel=1e-12)


def test_householder_starts_as_a_sort_of_pairs() -> None:
    x = draw(3, 4, 2, 2)
    a, b = x.chunk(2, dim=1)
    torch.testing.assert_close(Householder(4).double()(x), torch.cat((torch.minimum(a, b), torch.maximum(a, b)), 1))


def test_l2_pooling_is_the_norm_of_every_block_and_of_the_image() -> None:
    x = draw(2, 3, 4, 6)
    y = L2Pool2d(2)(x)
    for i in range(2):
        for j in range(3):
            block = x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            torch.testing.assert_close(y[:, :, i, j], block.square().sum((2, 3)).sqrt())
    torch.testing.assert_close(y.flatten(1).norm(dim=1), x.flatten(1).norm(dim=1))
    zero = torch.zeros(1, 1, 2, 2, requires_grad=True)
    L2Pool2d(2)(zero).sum().backward()
    assert zero.grad is not None
    assert not zero.grad.any()


@settings(max_examples=10, deadline=None)
@given(channels=st.integers(1, 3), kernel=st.sampled_from([1, 3]), seed=st.integers(0, 99))
def test_a_linear_residual_adds_its_input_and_is_bounded_as_a_whole(channels: int, kernel: int, seed: int) -> None:
    block = LinearResidual(channels, kernel).double()
    block.reset_parameters(torch.Generator().manual_seed(seed))
    x = draw(2, channels, 4, 5, seed=seed)
    plain = torch.nn.functional.conv2d(x, block.weight, block.bias, padding=kernel // 2)
    torch.testing.assert_close(block(x), x + plain)
    assert jacobian_norm(block, x[0]) <= block.lipschitz_constant()
    with torch.no_grad():
        block.weight.zero_()
        block.weight[:, :, kernel // 2, kernel // 2] = -0.5 * torch.eye(channels)
    assert block.lipschitz_constant() == pytest.approx(0.5)  # the sum of the norms would be 1.5


def test_batch_centring_subtracts_the_batch_then_its_running_mean() -> None:
    module, expected = BatchCentering(3, momentum=0.25).double(), torch.zeros(3, dtype=torch.float64)
    for seed in range(4):
        x = draw(5, 3, 2, 2, seed=seed)
        means = torch.stack([x[:, c].mean() for c in range(3)])
        torch.testing.assert_close(module(x), x - means.view(1, 3, 1, 1))
        expected = 0.75 * expected + 0.25 * means
    module.eval()
    torch.testing.assert_close(module(x), x - expected.view(1, 3, 1, 1))
    torch.testing.assert_close(module(x[:, :, 0, 0]), x[:, :, 0, 0] - expected)
    assert jacobian_norm(module, x[0]) == pytest.approx(1.0, abs=1e-12)


def test_batch_centring_keeps_its_mean_when_it_sees_no_example() -> None:
    module, reference = BatchCentering(3), nn.BatchNorm1d(3, affine=False)
    for batch in (draw(5, 3).float(), torch.zeros(0, 3), draw(4, 3, seed=1).float()):
        assert module(batch).shape == batch.shape
        reference(batch)
        torch.testing.assert_close(module.running_mean, reference.running_mean)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pooling_a_whole_map_in_half_precision_is_in_range_where_its_result_is(dtype: torch.dtype) -> None:
    x = (100 * draw(2, 3, 40, 50).abs()).to(dtype)  # a sum is about 160000
    exact = x.double().sum((2, 3), keepdim=True) / (40 * 50) ** 0.5
    y = ScaledAvgPool2d()(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "layer", [BatchCentering(4), Normalize((0.1, 0.2, 0.3, 0.4), 0.3), Normalize(0.5), Householder(4)], ids=repr
)
def test_results_have_the_dtype_of_the_input_in_either_mode(
    layer: nn.Module, dtype: torch.dtype, training: bool
) -> None:
    module, twin = (copy.deepcopy(layer).train(training) for _ in range(2))
    for one in (module, twin):
        for name, value in (*one.named_parameters(), *one.named_buffers()):
            if name in ("theta", "running_mean"):
                value.data.copy_(torch.linspace(0.3, 1.2, len(value)))
    x = (20 + draw(6, 4, 3, 2)).to(dtype)
    y, exact = module(x), twin.double()(x.double())
    assert y.dtype == dtype
    # One rounding to x's digits, and the rounding of sums near 20 in the precision of the parameters.
    least = 2.0**-22 * 40 if dtype is not torch.float64 else 1e-6
    torch.testing.assert_close(y.double(), exact, rtol=torch.finfo(dtype).eps, atol=least)
    for mine, other in zip(module.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=2.0**-22, atol=0)


def test_layers_that_change_their_weight_are_not_taken_for_torch_s() -> None:
    # Tools fold batch norms and adapters into the weights of those, and quantise them.
    assert not isinstance(LinearResidual(2), nn.Conv2d)
    assert not isinstance(NormalizedLinear(2, 3), nn.Linear)
    assert set(LinearResidual(2).state_dict()) == set(NormalizedLinear(2, 3).state_dict()) == {"weight", "bias"}
    assert set(LinearResidual(2, bias=False).state_dict()) == {"weight"}


def test_statistics_return_when_memory_is_given_to_them() -> None:
    with torch.device("meta"):
        module = Normalize([0.25, 0.5], [2.0, 4.0])
    assert "0.25, 0.5" in repr(module)
    module.to_empty(device="cpu")
    assert module.mean.flatten().tolist() == [0.25, 0.5]
    assert module.lipschitz_constant() == 0.5


def test_a_convex_sum_takes_a_function_of_another_precision() -> None:
    class Low(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.bfloat16()

    x = draw(2, 3).float()
    y = ConvexSum(Low(), 0.25)(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, 0.75 * x + 0.25 * x.bfloat16().float())


def test_the_constant_of_a_linear_residual_counts_what_float32_rounds_away() -> None:
    layer = LinearResidual(1, 1)
    nn.init.constant_(layer.weight, 2.0**-25)  # in float32, 1 more than that is 1
    assert 1 + 2.0**-25 <= layer.lipschitz_constant() <= 1 + 2.0**-24


def test_a_spectral_norm_is_rounded_up_and_nan_shows() -> None:
    assert 3.0 <= spectral_norm(torch.diag(torch.tensor([1.0, -3.0, 2.0]))) <= 3.0 * (1 + 1e-12)
    assert spectral_norm(torch.tensor([[float("nan")]])) != spectral_norm(torch.zeros(1, 1))
    assert not spectral_norm(torch.tensor([[float("inf"), 0.0]])) < float("inf")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: MaxMin()(torch.zeros(1, 3)), "3 channels"),
        (lambda: MaxMin()(torch.zeros(4)), r"input is \(4,\)"),
        (lambda: GroupSort(2)(torch.zeros(())), r"input is \(\)"),
        (lambda: GroupSort(1), "group_size is 1"),
        (lambda: Householder(3), "3 channels"),
        (lambda: Householder(4)(torch.zeros(1, 2)), r"give \(B, 4"),
        (lambda: BatchCentering(3)(torch.zeros(2, 1, 2, 2)), r"give \(B, 3"),
        (lambda: LinearResidual(2, 2), "kernel_size 2"),
        (lambda: L2Pool2d(2)(torch.zeros(1, 1, 3, 4)), "3×4"),
        (lambda: L2Pool2d(2)(torch.zeros(3, 4, 4)), r"input is \(3, 4, 4\): give \(B, C, H, W\)"),
        (lambda: InvertibleDownsampling(2)(torch.zeros(4)), r"input is \(4,\)"),
        (lambda: ScaledAvgPool2d(2)(torch.zeros(4)), r"input is \(4,\)"),
        (lambda: ScaledAvgPool2d()(torch.zeros(2, 3, 0, 4)), r"input is \(2, 3, 0, 4\)"),
        (lambda: ConvexSum(nn.Identity(), 1.0), "coefficient 1.0"),
        (lambda: InvertibleDownsampling(2)(torch.zeros(1, 1, 3, 4)), "3×4"),
        (lambda: InvertibleDownsampling(0), "factor is 0"),
        (lambda: ScaledAvgPool2d(0), "kernel_size is 0"),
        (lambda: ScaledAvgPool2d(2)(torch.ones(1, 1, 2, 2, dtype=torch.int64)), "int64"),
        (lambda: LinearResidual(0), "channels is 0"),
        (
            lambda: ScaledAvgPool2d(5)(torch.zeros(2, 3, 4, 4)),
            r"input is \(2, 3, 4, 4\): .* no side below kernel_size 5",
        ),
        (lambda: ScaledAvgPool2d(2)(torch.zeros(1, 2, 3, 4, 4)), r"input is \(1, 2, 3, 4, 4\): give \(B, C, H, W\)"),
        (lambda: ScaledAvgPool2d()(torch.zeros(1, 2, 3, 4, 4)), r"input is \(1, 2, 3, 4, 4\): give \(B, C, H, W\)"),
        (lambda: NormalizedLinear(3, 2)(torch.zeros(2, 5)), r"input is \(2, 5\): give \(…, 3\)"),
        (lambda: NormalizedLinear(3, 2)(torch.zeros(())), r"input is \(\): give \(…, 3\)"),
        (lambda: LinearResidual(3)(torch.zeros(2, 4, 5, 5)), r"input is \(2, 4, 5, 5\): give \(B, 3, H, W\)"),
        (lambda: LinearResidual(3)(torch.zeros(1, 2, 3, 5, 5)), r"input is .*: give \(B, 3, H, W\)"),
        (lambda: NormalizedLinear(0, 2), "in_features is 0"),
        (lambda: spectral_norm(torch.ones(2, 2, dtype=torch.complex64)), "complex64"),
        (lambda: spectral_norm(torch.ones(1, 1, 3, 3)), "kernel_norm bounds a convolution"),
        (lambda: kernel_norm(torch.ones(2, 2, 3, 3, dtype=torch.complex128)), "complex128"),
        (lambda: kernel_norm(torch.ones(2, 2)), "taps"),
        (lambda: kernel_norm(torch.ones(4, 3, 3, 3), groups=3), "no 3 groups"),
        (lambda: kernel_norm(torch.ones(4, 3, 3, 3), cover=0), "cover is 0"),
    ],
)
def test_bad_input_is_named(call: object, words: str) -> None:
    with pytest.raises(EspalierError, match=words):
        call()  # type: ignore[operator]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("layer", [
    BatchCentering(4), Normalize(0.5), Householder(4), NormalizedLinear(4, 3), LinearResidual(4), L2Pool2d(2),
    ScaledAvgPool2d(2), ScaledAvgPool2d(1), ScaledAvgPool2d(),
], ids=repr)  # fmt: skip
def test_arithmetic_on_other_than_real_numbers_is_refused_in_either_mode(
    layer: nn.Module, dtype: torch.dtype, training: bool
) -> None:
    with pytest.raises(EspalierError, match=rf"is {dtype}: convert it to .*floating"):
        layer.train(training)(torch.ones(2, 4, 4, 4, dtype=dtype))


def test_torch_fx_traces_the_normalised_head() -> None:
    layer, x = NormalizedLinear(4, 3), draw(2, 4).float()
    torch.testing.assert_close(torch.fx.symbolic_trace(layer)(x), layer(x))
