"""Orthogonal convolutions against the original's formula and against their own delta-probed Jacobian."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.errors import EspalierError
from espalier.nn import CayleyConv1d, CayleyConv2d, CayleyConv3d, CayleyConvTranspose2d, use_backend
from reference.cayley_original import original_cayley, original_convolution, original_spectrum
from rounding import assert_equal_up_to_rounding

# Square, wide and tall, past one leaf of the block inversion.
CHANNELS = [(4, 4), (5, 3), (3, 5), (12, 12)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(*shape: int, seed: int = 7, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def same_function(layer: CayleyConv2d, x: Tensor) -> Tensor:
    """Return what the original's formula gives at this image size, α converted to its norm."""
    x = F.pixel_unshuffle(x, layer.stride[0])
    norm = original_spectrum(layer.weight, *x.shape[2:]).norm()
    return original_convolution(x, layer.weight, layer.alpha * norm / layer.weight.norm(), layer.bias)


def jacobian(layer: nn.Module, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the layer's linear part as a float64 matrix (outputs, inputs), by feeding it every unit image."""
    units = torch.eye(math.prod(shape), dtype=dtype).view(-1, *shape)
    with torch.no_grad():
        answers = layer(units) - layer(torch.zeros_like(units[:1]))
    return answers.flatten(1).double().T


def singular_values(layer: nn.Module, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linalg.svdvals(jacobian(layer, *shape, dtype=dtype))


@settings(deadline=None, max_examples=30)
@given(
    channels=st.sampled_from(CHANNELS), kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    size=st.tuples(st.integers(5, 8), st.integers(5, 8)), stride=st.integers(1, 3), training=st.booleans(),
    name=st.sampled_from(["auto", "torch"]),
)  # fmt: skip
def test_equals_the_original_with_every_gradient(
    channels: tuple[int, int], kernel: tuple[int, int], size: tuple[int, int], stride: int, training: bool, name: str
) -> None:
    layer = CayleyConv2d(*channels, kernel, stride, dtype=torch.float64, generator=seeded()).train(training)
    with torch.no_grad():
        layer.alpha.mul_(1.7)
    x = images(2, channels[0], *(stride * n for n in size)).requires_grad_()
    wanted = (x, layer.weight, layer.alpha, layer.bias)
    with use_backend(name):
        ours, theirs = layer(x), same_function(layer, x)
        cotangent = images(*ours.shape, seed=8)
        gradients = [torch.autograd.grad(y, wanted, cotangent) for y in (ours, theirs)]
    assert (ours - theirs).abs().max() < 1e-10
    for mine, other in zip(*gradients, strict=True):
        assert (mine - other).abs().max() < 1e-10 * max(1.0, other.abs().max().item())


@pytest.mark.parametrize(
    ("training", "channels"), [(True, (70, 70)), (True, (140, 160)), (True, (160, 140)), (False, (70, 70))]
)
@pytest.mark.parametrize("name", ["auto", "torch"])
def test_equals_the_original_past_the_block_size(name: str, training: bool, channels: tuple[int, int]) -> None:
    with use_backend(name):
        check_against_the_original(training, channels)


def check_against_the_original(training: bool, channels: tuple[int, int]) -> None:
    layer = CayleyConv2d(*channels, 3, dtype=torch.float64, generator=seeded()).train(training)
    x = images(2, channels[0], 3, 4).requires_grad_()
    ours, theirs = layer(x), same_function(layer, x)
    assert (ours - theirs).abs().max() < 1e-10
    wanted = (x, layer.weight, layer.alpha)
    for mine, other in zip(
        *(torch.autograd.grad(y.square().sum() + y.sum(), wanted) for y in (ours, theirs)), strict=True
    ):
        assert (mine - other).abs().max() < 1e-10 * max(1.0, other.abs().max().item())


def test_groups_are_independent_layers() -> None:
    layer = CayleyConv2d(6, 4, 3, groups=2, dtype=torch.float64, generator=seeded())
    x = images(2, 6, 5, 6)
    whole = layer(x)
    for group in range(2):
        part = CayleyConv2d(3, 2, 3, dtype=torch.float64)
        rows = slice(2 * group, 2 * group + 2)
        with torch.no_grad():
            part.weight.copy_(layer.weight[rows])
            part.alpha.copy_(layer.alpha * part.weight.norm() / layer.weight.norm())  # one norm for all groups
            part.bias.copy_(layer.bias[rows])
        assert (part(x[:, 3 * group : 3 * group + 3]) - whole[:, rows]).abs().max() < 1e-12


def test_dilation_spreads_the_taps() -> None:
    layer = CayleyConv2d(3, 3, 3, dilation=(2, 1), dtype=torch.float64, generator=seeded())
    spread = CayleyConv2d(3, 3, (5, 3), dtype=torch.float64)
    with torch.no_grad():
        spread.weight.zero_()
        spread.weight[:, :, ::2] = layer.weight
        spread.alpha.copy_(layer.alpha)
        spread.bias.copy_(layer.bias)
    x = images(2, 3, 7, 6)
    assert (layer(x) - spread(x)).abs().max() < 1e-12


def test_kernels_larger_than_the_image_wrap_around() -> None:
    layer = CayleyConv2d(3, 3, 5, bias=False, dtype=torch.float64, generator=seeded())
    wrapped = torch.zeros(3, 3, 2, 2, dtype=torch.float64)
    for row in range(5):
        for column in range(5):
            wrapped[:, :, (row - 2) % 2, (column - 2) % 2] += layer.weight[:, :, row, column].detach()
    spectrum = torch.fft.fft2(wrapped).conj().permute(2, 3, 0, 1).reshape(4, 3, 3)
    q = original_cayley(spectrum * (layer.alpha / layer.weight.norm()))
    x = images(2, 3, 2, 2)
    x_hat = torch.fft.fft2(x).permute(2, 3, 1, 0).reshape(4, 3, 2)
    y = torch.fft.ifft2((q @ x_hat).reshape(2, 2, 3, 2).permute(3, 2, 0, 1)).real
    assert (layer(x) - y).abs().max() < 1e-12


@pytest.mark.parametrize("training", [True, False])
def test_one_axis_and_three_axes_equal_a_loop_over_frequencies(training: bool) -> None:
    for layer_class, size, dims in ((CayleyConv1d, (7,), (2,)), (CayleyConv3d, (3, 4, 5), (2, 3, 4))):
        layer = layer_class(3, 4, 3, dtype=torch.float64, generator=seeded()).train(training)
        kernel = torch.zeros(4, 3, *size, dtype=torch.float64)
        for tap in torch.cartesian_prod(*[torch.arange(3)] * len(size)).view(-1, len(size)).tolist():
            place = tuple((t - 1) % n for t, n in zip(tap, size, strict=True))
            kernel[(slice(None), slice(None), *place)] += layer.weight.detach()[(slice(None), slice(None), *tap)]
        count = math.prod(size)
        w_hat = torch.fft.fftn(kernel, dim=dims).conj().reshape(4, 3, count).permute(2, 0, 1)
        x = images(2, 3, *size)
        x_hat = torch.fft.fftn(x, dim=dims).reshape(2, 3, count).permute(2, 1, 0)
        q = original_cayley(w_hat * (layer.alpha / layer.weight.norm()))
        y_hat = (q @ x_hat).permute(2, 1, 0).reshape(2, 4, *size)
        y = torch.fft.ifftn(y_hat, dim=dims).real + layer.bias.view(-1, *[1] * len(size))
        assert (layer(x) - y).abs().max() < 1e-12


CASES = [
    {"kernel_size": 3}, {"kernel_size": (2, 4)}, {"kernel_size": 1}, {"kernel_size": 3, "stride": 2},
    {"kernel_size": 1, "stride": (3, 2)}, {"kernel_size": 3, "groups": 2}, {"kernel_size": 3, "dilation": 2},
    {"kernel_size": 2, "stride": 2, "groups": 2, "dilation": 2},
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("training", [True, False])
def test_singular_values_are_one_in_float64(case: dict[str, Any], training: bool) -> None:
    for channels in ((4, 4), (4, 6), (6, 4)):
        layer = CayleyConv2d(*channels, **case, dtype=torch.float64, generator=seeded()).train(training)
        assert (singular_values(layer, channels[0], 6, 6) - 1).abs().max() < 1e-12


@pytest.mark.parametrize("side", [6, 18, 36])  # of a small image, and of larger ones that get a product each
@pytest.mark.parametrize("stride", [1, 2, (1, 3)])
@pytest.mark.parametrize("cls", [CayleyConv2d, CayleyConvTranspose2d])
def test_one_tap_is_the_same_operator_in_either_memory_layout(
    cls: type, stride: int | tuple[int, int], side: int
) -> None:
    layer = cls(16, 6, 1, stride, dtype=torch.float64, generator=seeded())
    x = images(2, 16, side, side).requires_grad_()
    turned = x.detach().permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1).requires_grad_()
    ours, other = layer(turned), layer(x)
    torch.testing.assert_close(ours, other, rtol=0, atol=1e-12)
    weights = images(*ours.shape, seed=5)
    gradients = [
        torch.autograd.grad(y, [start, *layer.parameters()], weights) for y, start in ((ours, turned), (other, x))
    ]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_values_stay_one_through_hard_training(dtype: torch.dtype, stride: int) -> None:
    tolerance = 2e-6 if dtype == torch.float32 else 1e-12
    layer = CayleyConv2d(8, 8 * stride**2, 3, stride, dtype=dtype, generator=seeded())
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    x, before, alpha = images(16, 8, 6, 6, dtype=dtype), layer.weight.detach().clone(), layer.alpha.item()
    target = images(16, 8 * stride**2, 6 // stride, 6 // stride, seed=9, dtype=dtype)
    assert (singular_values(layer, 8, 6, 6, dtype=dtype) - 1).abs().max() < tolerance
    for _ in range(50):
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        optimizer.step()
    assert (layer.weight - before).norm() > before.norm()
    assert abs(layer.alpha.item() - alpha) > 0.1  # α is trained too, by an optimiser built before the first forward
    for training in (True, False):
        assert (singular_values(layer.train(training), 8, 6, 6, dtype=dtype) - 1).abs().max() < tolerance


@pytest.mark.parametrize(
    "case", [{"kernel_size": 3}, {"kernel_size": (4, 2), "dilation": 2}, {"kernel_size": 3, "stride": 2}]
)
def test_zero_padding_is_the_convolution_of_a_larger_torus_cropped(case: dict[str, Any]) -> None:
    layer = CayleyConv2d(4, 4, **case, padding_mode="zeros", dtype=torch.float64, generator=seeded())
    sigma = singular_values(layer, 4, 6, 6)
    assert sigma.max() < 1 + 1e-12
    assert sigma.min() < 0.999  # a contraction indeed: what leaves the image is lost
    wrap = CayleyConv2d(4, 4, **case, dtype=torch.float64)
    wrap.load_state_dict(layer.state_dict())
    stride = layer.stride[0]
    reach = [stride * d * (k - 1) for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
    low = [stride * (d * (k - 1) // 2) for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
    x = images(2, 4, 6, 6)
    padded = torch.zeros(2, 4, 6 + reach[0], 6 + reach[1], dtype=torch.float64)
    padded[:, :, low[0] : low[0] + 6, low[1] : low[1] + 6] = x
    y = wrap(padded)[:, :, low[0] // stride :, low[1] // stride :][:, :, : 6 // stride, : 6 // stride]
    assert (layer(x) - y).abs().max() < 1e-12


@pytest.mark.parametrize("case", [*CASES, {"kernel_size": 3, "padding_mode": "zeros", "stride": 2}])
def test_transpose_is_the_adjoint(case: dict[str, Any]) -> None:
    for channels in ((4, 4), (4, 6), (6, 4)):
        forward = CayleyConv2d(*channels, **case, bias=False, dtype=torch.float64, generator=seeded())
        transposed = CayleyConvTranspose2d(*channels[::-1], **case, bias=False, dtype=torch.float64)
        transposed.load_state_dict(forward.state_dict())
        x = images(2, channels[0], 6, 6)
        y = images(*forward(x).shape, seed=8)
        for training in (True, False):
            gap = (forward.train(training)(x) * y).sum() - (x * transposed.train(training)(y)).sum()
            assert abs(gap.item()) < 1e-11


def test_transpose_has_the_gradients_of_the_adjoint() -> None:
    forward = CayleyConv2d(3, 4, 3, bias=False, dtype=torch.float64, generator=seeded())
    transposed = CayleyConvTranspose2d(4, 3, 3, bias=False, dtype=torch.float64)
    transposed.load_state_dict(forward.state_dict())
    x, y = images(2, 3, 5, 4), images(2, 4, 5, 4, seed=8)
    (mine,) = torch.autograd.grad((forward(x) * y).sum(), forward.weight)
    (other,) = torch.autograd.grad((x * transposed(y)).sum(), transposed.weight)
    assert (mine - other).abs().max() < 1e-10


def test_a_chain_keeps_the_fast_layout_and_a_channels_last_input_gives_the_same() -> None:
    layer = CayleyConv2d(4, 4, 3, generator=seeded())
    x = images(3, 4, 6, 6, dtype=torch.float32)
    y = layer(x)
    assert y.permute(2, 3, 0, 1).is_contiguous()
    assert layer(y.relu()).permute(2, 3, 0, 1).is_contiguous()
    assert CayleyConv2d(4, 8, 3, 2)(y).permute(2, 3, 0, 1).is_contiguous()
    torch.testing.assert_close(layer(x.contiguous(memory_format=torch.channels_last)), y)
    torch.testing.assert_close(layer(y.contiguous()), layer(y))


@pytest.mark.parametrize("channels", [5, 8, 16, 24])
@pytest.mark.parametrize("training", [True, False])
def test_output_independent_of_batch_composition(channels: int, training: bool) -> None:
    layer = CayleyConv2d(channels, channels, 3, generator=seeded()).train(training)
    x = images(4, channels, 8, 8, dtype=torch.float32)
    y = layer(x)
    loud = x.clone()
    loud[::2] *= 1e6
    loud[0, 0, 0, 0] = math.nan
    # Sums of 8 + 8 pixels there and back and of the channels between; the layer lengthens no image.
    scale = 8 * x.flatten(1).norm(dim=1).max() + layer.bias.norm()
    assert_equal_up_to_rounding(layer(loud)[1::2], y[1::2], terms=4 * 8 + channels, scale=scale, condition=channels)


def test_autocast_and_half_precision_compute_in_float32() -> None:
    layer = CayleyConv2d(4, 4, 3, generator=seeded())
    x = images(2, 4, 6, 6, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), layer(x.clone()))
        inside = layer(x)
        inside.sum().backward()
    assert inside.dtype == torch.float32
    # Float32's rounding and not bfloat16's, which is 2¹⁶ as large: 12 terms there and back, 4 channels, one solve.
    assert_equal_up_to_rounding(inside, layer(x), terms=40, scale=6 * x.flatten(1).norm(dim=1).max())
    half = copy.deepcopy(layer).bfloat16()
    wide = CayleyConv2d(4, 4, 3)
    wide.load_state_dict(half.state_dict())
    assert torch.equal(half(x.bfloat16()), wide(x.bfloat16().float()).bfloat16())


def test_a_weight_of_zeros_is_the_identity() -> None:
    layer = CayleyConv2d(4, 4, 3, bias=False)
    nn.init.zeros_(layer.weight)
    x = images(2, 4, 6, 6, dtype=torch.float32)
    torch.testing.assert_close(layer(x), x)
    layer(x).sum().backward()
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("scale", [1e-6, 1e-8, 1e-12])
def test_the_size_of_a_weight_does_not_matter(scale: float) -> None:
    layer = CayleyConv2d(4, 4, 3, generator=seeded())
    x = images(2, 4, 6, 6, dtype=torch.float32)
    wanted = layer.eval()(x)
    with torch.no_grad():
        layer.weight *= scale
    for training in (True, False):
        torch.testing.assert_close(layer.train(training)(x), wanted)


def test_seeds_repeat_and_meta_layers_can_be_filled_later() -> None:
    one, two = (CayleyConv2d(4, 6, 3, generator=seeded(3)) for _ in range(2))
    late = CayleyConv2d(4, 6, 3, device="meta").to_empty(device="cpu")
    late.reset_parameters(seeded(3))
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name])
        assert torch.equal(value, late.state_dict()[name])
    assert list(one.state_dict()) == ["weight", "alpha", "bias"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_channels": 4, "out_channels": 4, "kernel_size": 0}, "kernel_size is 0"),
        ({"in_channels": 4, "out_channels": 4, "kernel_size": (3, 3, 3)}, "kernel_size"),
        ({"in_channels": 4, "out_channels": 4, "kernel_size": 3, "stride": 0}, "stride is 0"),
        ({"in_channels": 4, "out_channels": 6, "kernel_size": 3, "groups": 4}, "groups"),
        ({"in_channels": 0, "out_channels": 6, "kernel_size": 3}, "channels"),
        ({"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding_mode": "reflect"}, "padding_mode 'reflect'"),
        ({"in_channels": 4, "out_channels": 6, "kernel_size": 3, "dtype": torch.int32}, "dtype torch.int32"),
    ],
)
def test_refuses_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(EspalierError, match=message):
        CayleyConv2d(**arguments)


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("shape", [(2, 3, 6, 6), (4, 6, 6), (2, 4, 5, 6), (2, 4, 0, 6), (2, 4, 6, 0)])
def test_refuses_images_that_do_not_fit(shape: tuple[int, ...], kernel_size: int) -> None:
    with pytest.raises(EspalierError, match=r"input is|image size"):
        CayleyConv2d(4, 4, kernel_size, 2)(torch.zeros(shape))


@pytest.mark.parametrize("grad", [True, False])
def test_what_a_layer_hands_out_may_be_changed(grad: bool) -> None:
    layer, x = CayleyConv2d(4, 4, 3, bias=False, generator=seeded()).eval(), images(2, 4, 6, 6)
    before = layer(x)
    with torch.set_grad_enabled(grad):
        planes = layer.operator((6, 6), torch.float32)
    with torch.no_grad():
        planes *= 3
    assert torch.equal(layer(x), before)
