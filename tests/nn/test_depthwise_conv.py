"""The depthwise convolution and the fused GELU and batch norm against torch's own layers in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from espalier.errors import EspalierError
from espalier.models import ConvMixer
from espalier.nn import DepthwiseConv2d, backend, use_backend
from espalier.nn.depthwise import mixing_block, pointwise_block
from espalier.nn.kernels.depthwise import Norm, gelu_norm, mix

needs_kernels = pytest.mark.skipif(backend().name != "compiled", reason="the package was built without a compiler")
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-12, torch.bfloat16: 2e-2}
# torch's own remark on even kernels, whose padding is not the same on both sides.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def draw_map(*size: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous", seed: int = 0) -> Tensor:
    """Return a map in one of the layouts that users hand over."""
    batch, channels, height, width = size
    wider = torch.randn(batch, channels, height, 2 * width, generator=torch.Generator().manual_seed(seed)).to(dtype)
    x = wider[..., ::2]  # every second column of a wider map
    if layout == "strided":
        return x
    return x.contiguous(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)


def step(module: nn.Module, x: Tensor, seed: int = 1) -> dict[str, Tensor]:
    """Return the output, and the gradients of x and of every parameter, of one pass forward and back."""
    x = x.detach().requires_grad_()
    y = module(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y.dtype))
    grads = {f"d{name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad, **grads, **dict(module.named_buffers())}


def assert_close(ours: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == wanted.keys()
    for name, value in wanted.items():
        error = (ours[name].double() - value.double()).abs().max()
        assert error <= tolerance * (1 + value.double().abs().max()), (name, error)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_the_convolution_is_torchs_in_value_and_gradients(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(list(TOLERANCE)), label="dtype")
    channels = data.draw(st.integers(1, 70), label="channels")
    kernel = data.draw(st.tuples(st.integers(1, 15), st.integers(1, 15)), label="kernel")
    padding: Any = data.draw(
        st.sampled_from(["same", "valid"]) | st.tuples(st.integers(0, 16), st.integers(0, 16)), label="padding"
    )
    size = tuple(data.draw(st.integers(1, 20), label="size") for _ in kernel)
    room = (0, 0) if padding == "valid" else tuple(k - 1 for k in kernel) if padding == "same" else padding
    size = tuple(max(n, k - 2 * r) for n, k, r in zip(size, kernel, room, strict=True))
    stride = data.draw(st.sampled_from([1, 1, 1, 2]) if padding != "same" else st.just(1), label="stride")
    layer = DepthwiseConv2d(channels, kernel, stride, padding, bias=data.draw(st.booleans(), label="bias")).to(dtype)
    layer.weight.requires_grad_(data.draw(st.booleans(), label="trained"))
    layout = data.draw(st.sampled_from(["contiguous", "channels_last", "strided"]), label="layout")
    x = draw_map(data.draw(st.integers(1, 3), label="batch"), channels, *size, dtype=dtype, layout=layout)
    twin = nn.Conv2d(channels, channels, kernel, stride, padding, groups=channels, bias=layer.bias is not None).double()
    twin.load_state_dict(layer.state_dict())
    twin.weight.requires_grad_(layer.weight.requires_grad)
    assert_close(step(layer, x), step(twin, x.double()), 10 * TOLERANCE[dtype])


class Blocks(nn.Module):
    """Both fused functions on modules of torch, or the same modules one by one."""

    def __init__(self, channels: int, kernel: int, norm: dict[str, Any], fused: bool = True) -> None:
        super().__init__()
        self.mix = nn.Conv2d(channels, channels, kernel, groups=channels, padding="same")
        self.point, self.act = nn.Conv2d(channels, channels, 1), nn.GELU()
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels, **norm) for _ in range(2))
        self.fused = fused
        generator = torch.Generator().manual_seed(0)
        for tensor in (*self.norms.parameters(), *(b for b in self.norms.buffers() if b.is_floating_point())):
            tensor.data.uniform_(0.5, 2, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            return pointwise_block(
                mixing_block(x, self.mix, self.act, self.norms[0]), self.point, self.act, self.norms[1]
            )
        x = x + self.norms[0](self.act(self.mix(x)))
        return self.norms[1](self.act(self.point(x)))

    def twin(self) -> Blocks:
        """Return a copy in float64 whose modules are called one by one."""
        other = copy.deepcopy(self).double()
        other.fused = False
        return other


class Mixed(nn.Module):
    """The first of the blocks alone."""

    def __init__(self, blocks: Blocks) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, x: Tensor) -> Tensor:
        return mixing_block(x, self.blocks.mix, self.blocks.act, self.blocks.norms[0])


@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_fused_blocks_are_torchs_modules_in_value_gradients_and_statistics(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(list(TOLERANCE)), label="dtype")
    norm = {
        "momentum": data.draw(st.sampled_from([0.1, 0.7, None]), label="momentum"),
        "track_running_stats": data.draw(st.booleans(), label="tracked"),
        "affine": data.draw(st.sampled_from([True, True, True, False]), label="affine"),
        # Half precision keeps 8 bits: a norm that divides by a deviation far below its mean leaves none of them.
        "eps": 1e-1 if dtype == torch.bfloat16 else data.draw(st.sampled_from([1e-5, 1e-2]), label="eps"),
    }
    channels = data.draw(st.integers(1, 70), label="channels")
    with torch.random.fork_rng():
        torch.manual_seed(channels)
        net = Blocks(channels, data.draw(st.integers(2, 15), label="kernel"), norm)
    net.train(data.draw(st.booleans(), label="training"))
    batch, height, width = (data.draw(st.integers(low, 12), label="size") for low in (2, 3, 3))
    layout = data.draw(st.sampled_from(["contiguous", "channels_last", "strided"]), label="layout")
    # Half precision as users have it: maps by autocast, parameters in float32.
    x = draw_map(batch, channels, height, width, dtype=dtype, layout=layout)
    net.to(torch.float32 if dtype == torch.bfloat16 else dtype)
    twin = net.twin()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        ours = step(net, x)
    assert_close(ours, step(twin, x.double()), 20 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(2, 40, 40, 44), (9, 70, 20, 21), (1, 20, 90, 75)])
def test_so_are_they_on_maps_whose_frames_fill_the_cache(size: tuple[int, ...], dtype: torch.dtype) -> None:
    net, x = Blocks(size[1], 5, {"eps": 1e-1 if dtype == torch.bfloat16 else 1e-5}), draw_map(*size, dtype=dtype)
    twin = net.twin()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        ours = step(net, x)
    # A parameter's gradient sums as many errors as there are pixels.
    assert_close(ours, step(twin, x.double()), 100 * TOLERANCE[dtype] if dtype == torch.float32 else 0.4)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_that_count_no_batches_move_as_torchs(momentum: float | None) -> None:
    net, x = Blocks(6, 3, {"momentum": momentum}).train(), draw_map(2, 6, 5, 5)
    for norm in net.norms:
        assert isinstance(norm, nn.BatchNorm2d)
        norm.num_batches_tracked = None
    twin = net.twin()
    for _ in range(2):
        assert_close(step(net, x), step(twin, x.double()), 20 * TOLERANCE[torch.float32])


class Counting(nn.Module):
    """A parametrisation that is another one at each look, as random and iterating ones are."""

    looks = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.looks += 1
        return weight * self.looks


@pytest.mark.parametrize("stride", [1, 2])  # by the kernel, and by torch
def test_a_parametrised_weight_is_looked_at_once(stride: int) -> None:
    conv, x = DepthwiseConv2d(4, 3, stride, padding=1), draw_map(2, 4, 6, 6)
    weight = conv.weight.detach().clone()
    nn.utils.parametrize.register_parametrization(conv, "weight", counting := Counting())
    before, y = counting.looks, conv(x)
    assert counting.looks == before + 1
    expected = nn.functional.conv2d(x, weight * counting.looks, conv.bias, stride, 1, groups=4)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", [pointwise_block, mixing_block])
def test_the_blocks_look_at_a_parametrised_weight_once(block: Callable[..., Tensor]) -> None:
    conv = nn.Conv2d(4, 4, 1) if block is pointwise_block else DepthwiseConv2d(4, 3)
    nn.utils.parametrize.register_parametrization(conv, "weight", counting := Counting())
    before = counting.looks
    block(draw_map(2, 4, 6, 6), conv, nn.GELU(), nn.BatchNorm2d(4))
    assert counting.looks == before + 1


@needs_kernels
@pytest.mark.parametrize("first", [0.0, 1e4])
def test_variances_far_below_the_mean_keep_their_digits(first: float) -> None:
    u = 100 + 0.01 * torch.randn(3, 20, 8, 9, generator=torch.Generator().manual_seed(0))
    u[0, :, 0, 0] += first
    u = u.contiguous(memory_format=torch.channels_last)
    norm = Norm(torch.ones(20), torch.zeros(20), 1e-5, None, None)
    for padded in (False, True):  # statistics of the rows, and of a convolution that changes nothing
        taps = torch.zeros(20, 1, 3, 3)
        taps[:, 0, 1, 1] = 1
        _, mean, variance = mix(u, taps, None, norm, (1, 1, 1, 1)) if padded else gelu_norm(u.clone(), None, norm)
        wanted = u.double().transpose(0, 1).flatten(1)
        atol = 1e-5 * float(wanted.std(1).max())
        torch.testing.assert_close(mean.double(), wanted.mean(1), rtol=1e-6, atol=atol)
        torch.testing.assert_close(variance.double(), wanted.var(1, correction=0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
def test_autocast_narrows_no_residual(padding_mode: str) -> None:
    conv, act, norm = nn.Conv2d(9, 9, 3, padding=1, groups=9, padding_mode=padding_mode), nn.GELU(), nn.BatchNorm2d(9)
    x = draw_map(2, 9, 6, 5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        branch, ours = norm.eval()(act(conv(x))), mixing_block(x, conv, act, norm)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, x + branch, rtol=1e-6, atol=1e-6)  # a map in bfloat16 would be 4e-3 away


@needs_kernels
def test_gradcheck_of_both_in_double_precision() -> None:
    net = Blocks(3, 4, {}).double()
    x = draw_map(2, 3, 4, 3, dtype=torch.float64).requires_grad_()
    parameters = {name: p.detach().requires_grad_() for name, p in net.named_parameters()}

    def function(x: Tensor, *values: Tensor) -> Tensor:
        named = dict(zip(parameters, values, strict=True)) | dict(copy.deepcopy(net).named_buffers())
        return torch.func.functional_call(net, named, x)

    assert torch.autograd.gradcheck(function, (x, *parameters.values()))


@needs_kernels
@pytest.mark.parametrize("threads", [2, 5])
def test_results_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    net, x, before = Blocks(40, 5, {}), draw_map(5, 40, 9, 8), torch.get_num_threads()
    # The pointwise product is the library's, and may depend on them; what is ours may not.
    layers = nn.Sequential(DepthwiseConv2d(40, 7), Mixed(net))
    try:
        results = []
        for count in (1, threads):
            torch.set_num_threads(count)
            layers.zero_grad()
            results.append(step(layers, x))
    finally:
        torch.set_num_threads(before)
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def test_hooks_patches_and_other_norms_are_called() -> None:
    x, seen = draw_map(2, 4, 6, 6), []
    net = Blocks(4, 3, {})
    expected = net.twin().eval()(x.double())
    net.eval()
    handle = net.norms[0].register_forward_hook(lambda *_: seen.append("norm"))
    torch.testing.assert_close(net(x).double(), expected, rtol=1e-4, atol=1e-5)
    handle.remove()
    with net.act.register_forward_pre_hook(lambda *_: seen.append("act")):
        net(x)
    net.mix.forward = lambda x: seen.append("conv") or x  # type: ignore[method-assign]
    net(x)
    assert seen == ["norm", "act", "act", "conv"]

    class Other(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return torch.full_like(input, 7.0)

    net.norms[1] = Other(4)
    assert (net(x) == 7).all()


class Doubled(nn.Conv2d):
    """Convolves with twice its weight, as a subclass that quantises or standardises it does with another."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, 2 * weight, bias)


class Called(nn.Conv2d):
    """Convolves with twice its weight when it is called."""

    def __call__(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, 2 * self.weight, self.bias)


def through_its_forward(conv: nn.Conv2d) -> nn.Conv2d:
    """Return torch's layer with a patch on the instance that doubles its weight."""
    inner = conv._conv_forward
    conv._conv_forward = lambda x, weight, bias: inner(x, 2 * weight, bias)  # type: ignore[method-assign]
    return conv


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [Doubled, Called, lambda *a, **k: through_its_forward(nn.Conv2d(*a, **k))])
def test_convolutions_that_change_their_weight_are_called(kind: Callable[..., nn.Conv2d], training: bool) -> None:
    net = Blocks(4, 3, {}).train(training)
    x = draw_map(2, 4, 6, 6)
    net.mix, net.point = kind(4, 4, 3, groups=4, padding="same"), kind(4, 4, 1)
    plain = copy.deepcopy(net)
    plain.mix, plain.point = nn.Conv2d(4, 4, 3, groups=4, padding="same"), nn.Conv2d(4, 4, 1)
    for ours, theirs in ((net.mix, plain.mix), (net.point, plain.point)):
        theirs.load_state_dict({"weight": 2 * ours.weight, "bias": ours.bias})
    torch.testing.assert_close(net(x).double(), plain.twin()(x.double()), rtol=1e-4, atol=1e-5)


def test_quantisation_aware_convolutions_quantise() -> None:
    import torch.ao.nn.qat as qat
    from torch.ao.quantization import get_default_qat_qconfig

    net, x, results = Blocks(4, 3, {}).eval(), draw_map(2, 4, 6, 6), []
    for net.fused in (True, False):
        torch.manual_seed(0)
        net.point = qat.Conv2d(4, 4, 1, qconfig=get_default_qat_qconfig("x86")).eval()
        results.append(net(x))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_synchronised_statistics_are_left_to_torch() -> None:
    net = nn.SyncBatchNorm.convert_sync_batchnorm(Blocks(4, 3, {})).eval()
    assert type(net.norms[0]) is nn.SyncBatchNorm
    x = draw_map(2, 4, 6, 6)
    torch.testing.assert_close(net(x).double(), net.twin()(x.double()), rtol=1e-4, atol=1e-5)


def test_one_value_a_channel_is_refused_as_torch_refuses_it() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        Blocks(4, 3, {})(draw_map(1, 4, 1, 1))


@pytest.mark.parametrize("training", [True, False])
def test_patches_as_large_as_one_image_are_refused_as_torch_refuses_them(training: bool) -> None:
    conv, act, norm = nn.Conv2d(3, 8, 4, 4), nn.GELU(), nn.BatchNorm2d(8, track_running_stats=training)
    norm.train(training)  # without running statistics those of the batch are taken in evaluation, too
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        pointwise_block(draw_map(1, 3, 4, 4), conv, act, norm)
    if training:
        assert torch.equal(norm.running_var, torch.ones(8))


def test_the_layer_has_the_parameters_of_torchs_and_refuses_no_channels() -> None:
    ours, torchs = DepthwiseConv2d(6, 5), nn.Conv2d(6, 6, 5, groups=6, padding="same")
    assert {n: p.shape for n, p in ours.state_dict().items()} == {n: p.shape for n, p in torchs.state_dict().items()}
    with pytest.raises(EspalierError, match="channels is 0"):
        DepthwiseConv2d(0, 3)


@needs_kernels
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_convmixer_trains_the_same_with_and_without_the_kernels(layout: str) -> None:
    net = ConvMixer(24, 3, 5, 2, num_classes=5)
    net.init_weights(torch.Generator().manual_seed(0))
    twin = copy.deepcopy(net).double()
    x = draw_map(4, 3, 16, 16, layout=layout)
    ours = step(net, x)
    with use_backend("torch"):
        assert_close(ours, step(twin, x.double()), 1e-4)
