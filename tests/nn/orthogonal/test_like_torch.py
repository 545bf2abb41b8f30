"""Orthogonal layers under torch's tools: checkpointing, torch.func, fake tensors, second derivatives, odd tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call, functionalize, grad, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

from espalier.models import KWLarge, OrthogonalConvNet
from espalier.nn import (
    CayleyConv1d,
    CayleyConv2d,
    CayleyConv3d,
    CayleyConvTranspose2d,
    CayleyLinear,
    cayley,
    parametrize_cayley,
    use_backend,
)
from espalier.nn.lipschitz.activations import GroupSort, MaxMin
from espalier.nn.orthogonal import conv

LAYERS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "square": (lambda **k: CayleyConv2d(2, 2, 3, **k), (3, 2, 4, 3)),
    "tall": (lambda **k: CayleyConv2d(2, 5, 3, **k), (3, 2, 3, 4)),
    "wide": (lambda **k: CayleyConv2d(5, 2, 3, **k), (3, 5, 3, 3)),
    "groups": (lambda **k: CayleyConv2d(4, 6, 2, groups=2, dilation=2, **k), (3, 4, 4, 3)),
    "strided": (lambda **k: CayleyConv2d(2, 4, 3, stride=2, padding_mode="zeros", **k), (3, 2, 4, 4)),
    "one-tap": (lambda **k: CayleyConv2d(2, 3, 1, stride=2, **k), (3, 2, 4, 4)),
    "1d": (lambda **k: CayleyConv1d(2, 3, 3, **k), (3, 2, 5)),
    "3d": (lambda **k: CayleyConv3d(2, 1, 2, **k), (3, 2, 2, 3, 2)),
    "transposed": (lambda **k: CayleyConvTranspose2d(4, 1, 3, stride=2, **k), (3, 4, 2, 3)),
    "linear-square": (lambda **k: CayleyLinear(4, 4, **k), (3, 4)),
    "linear-tall": (lambda **k: CayleyLinear(3, 5, **k), (3, 3)),
    "linear-wide": (lambda **k: CayleyLinear(5, 3, **k), (3, 5)),
    "maxmin": (lambda **_: MaxMin(), (3, 4, 2)),
    "groupsort": (lambda **_: GroupSort(2), (3, 4, 2)),
}
every_layer = pytest.mark.parametrize("name", LAYERS)
both_modes = pytest.mark.parametrize("training", [True, False])


@pytest.fixture(autouse=True)
def small_images_get_a_product_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger ones do, too; torch's own convolution needs no test."""
    monkeypatch.setattr(conv, "_MANY", 1)
    monkeypatch.setattr(conv, "_WIDE", 1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def case(name: str, training: bool) -> tuple[nn.Module, Tensor]:
    make, shape = LAYERS[name]
    layer = make(dtype=torch.float64, generator=seeded()).train(training)
    return layer, torch.randn(shape, dtype=torch.float64, generator=seeded(1))


def as_function(layer: nn.Module) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Return the layer as a function of its input and its parameters, and these."""
    names = [name for name, _ in layer.named_parameters()]
    return (
        lambda x, *values: functional_call(layer, dict(zip(names, values, strict=True)), (x,)),
        [p.detach() for p in layer.parameters()],
    )


@every_layer
@both_modes
def test_checkpointing_changes_no_gradient(name: str, training: bool) -> None:
    layer, x = case(name, training)
    x.requires_grad_()
    wanted = [x, *layer.parameters()]
    plain = torch.autograd.grad(layer(x).square().cos().sum(), wanted)
    found = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().cos().sum(), wanted)
    torch.testing.assert_close(list(found), list(plain), rtol=1e-12, atol=1e-12)
    checkpoint(layer, x, use_reentrant=True).square().cos().sum().backward()
    torch.testing.assert_close([tensor.grad for tensor in wanted], list(plain), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda: KWLarge(width=4, hidden=16, img_size=8),
        lambda: OrthogonalConvNet(widths=(4,), depths=(2,), hidden=16, img_size=8),
    ],
)
def test_models_recompute_where_asked(make: Callable[[], nn.Module]) -> None:
    model = make().double()
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=seeded())
    found, kept = [], []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        runs: list[nn.Module] = []
        handles = [m.register_forward_hook(lambda m, *_, runs=runs: runs.append(m)) for m in model.modules()]
        found.append(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))
        kept.append(len(runs))
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-10)
    assert kept[1] > kept[0]  # modules ran again


@every_layer
@both_modes
def test_first_and_second_derivatives_are_those_of_differences(name: str, training: bool) -> None:
    layer, x = case(name, training)
    function, values = as_function(layer)
    inputs = [t.clone().requires_grad_() for t in (x[:1], *values)]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("shape", [(3, 3), (2, 4, 2), (2, 2, 5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_the_transform_is_twice_differentiable(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    matrix = torch.randn(shape, dtype=dtype, generator=seeded()).requires_grad_()
    assert torch.autograd.gradcheck(cayley, matrix)
    assert torch.autograd.gradgradcheck(cayley, matrix)


def test_a_gradient_penalty_trains_a_critic_of_orthogonal_layers() -> None:
    convolution = CayleyConv2d(2, 4, 3, generator=seeded())
    critic = nn.Sequential(convolution, MaxMin(), nn.Flatten(), CayleyLinear(64, 1, generator=seeded())).double()
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=seeded(1), requires_grad=True)
    weight = convolution.weight

    def penalty() -> Tensor:
        (slope,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        return (slope.flatten(1).cos() ** 2).sum()

    (found,) = torch.autograd.grad(penalty(), weight)
    direction, step = torch.randn(weight.shape, dtype=torch.float64, generator=seeded(2)), 1e-6
    with torch.no_grad():
        weight += step * direction
    above = penalty()
    with torch.no_grad():
        weight -= 2 * step * direction
    assert abs((above - penalty()).item() / (2 * step) - (found * direction).sum().item()) < 1e-6
    assert found.abs().max() > 1e-3


@every_layer
@both_modes
def test_per_sample_gradients_are_those_of_a_loop(name: str, training: bool) -> None:
    layer, x = case(name, training)
    function, values = as_function(layer)
    places = tuple(range(1 + len(values)))

    def loss(x: Tensor, *values: Tensor) -> Tensor:
        return function(x[None], *values).square().cos().sum()

    together = vmap(grad(loss, argnums=places), in_dims=(0, *[None] * len(values)))(x, *values)
    wanted = [p.requires_grad_() for p in values]
    for index, one in enumerate(x):
        one = one.clone().requires_grad_()
        alone = torch.autograd.grad(loss(one, *wanted), [one, *wanted])
        torch.testing.assert_close([t[index] for t in together], list(alone), rtol=1e-10, atol=1e-10)


@every_layer
@both_modes
def test_transforms_agree_with_each_other_and_leave_nothing_behind(name: str, training: bool) -> None:
    layer, x = case(name, training)
    function, values = as_function(layer)
    before = function(x, *values)
    backward = jacrev(function, argnums=tuple(range(1 + len(values))))(x[:1], *values)
    forward = jacfwd(function, argnums=tuple(range(1 + len(values))))(x[:1], *values)
    torch.testing.assert_close(backward, forward, rtol=1e-10, atol=1e-10)
    tangents = [torch.randn(t.shape, dtype=t.dtype, generator=seeded(3)) for t in (x, *values)]
    y, slope = jvp(function, (x, *values), tuple(tangents))
    torch.testing.assert_close(y, before, rtol=1e-10, atol=1e-10)
    _, pull = vjp(function, x, *values)
    there = sum((one * two).sum() for one, two in zip(pull(slope), tangents, strict=True))
    torch.testing.assert_close(there, slope.square().sum(), rtol=1e-8, atol=1e-10)
    stacked = vmap(function, in_dims=(0, *[None] * len(values)))(torch.stack((x, -x)), *values)
    torch.testing.assert_close(stacked[1], function(-x, *values), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(functionalize(function)(x, *values), before, rtol=1e-10, atol=1e-10)
    assert torch.equal(function(x, *values), before)  # and the caches still hold plain tensors
    assert torch.isfinite(layer(x)).all()


@both_modes
def test_failed_calls_leave_the_caches_usable(training: bool) -> None:
    size = 23 if training else 29  # of this test alone: no earlier call has filled the caches

    def broken(x: Tensor) -> Tensor:
        layer(x).sum()
        raise RuntimeError("stopped here")

    for transform in (grad, vmap, functionalize, jacfwd):
        layer = CayleyConv2d(1, 2, 3, generator=seeded()).train(training)
        x = torch.randn(2, 1, size, 3, generator=seeded())
        with pytest.raises(RuntimeError, match="stopped here"):
            transform(broken)(x[:, None] if transform is vmap else x)
        for net in (layer, CayleyConv2d(1, 2, 3, generator=seeded()).train(training)):
            y = net(x.requires_grad_())
            y.sum().backward()
            torch.testing.assert_close(y, copy.deepcopy(layer).double()(x.double()).float(), rtol=1e-4, atol=1e-5)


@every_layer
@both_modes
def test_fake_tensors_pass_and_leave_nothing_behind(name: str, training: bool) -> None:
    layer, x = case(name, training)
    y = layer(x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        shadow = layer(mode.from_tensor(x))
        assert isinstance(shadow, FakeTensor)
        assert shadow.shape == y.shape
    torch.testing.assert_close(layer(x), y, rtol=1e-12, atol=1e-12)


@every_layer
@both_modes
@settings(deadline=None, max_examples=6)
@given(kind=st.sampled_from(["negative", "conjugate", "strided", "channels_last", "expanded", "offset"]))
def test_tensors_that_mean_something_else_than_their_memory(name: str, training: bool, kind: str) -> None:
    layer, x = case(name, training)
    plain = x
    if kind == "negative":
        x = torch._neg_view(-x)
    elif kind == "conjugate":
        x = torch.complex(torch.zeros_like(x), -x).conj().imag  # has the negative bit
    elif kind == "strided":
        x = torch.stack((x, torch.full_like(x, torch.nan)), -1)[..., 0]
    elif kind == "channels_last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    elif kind == "expanded":
        x = x[:1].expand_as(x)
        plain = x.clone(memory_format=torch.contiguous_format)
    else:
        x = torch.cat((torch.full((1, *x.shape[1:]), torch.nan, dtype=x.dtype), x))[1:]
    torch.testing.assert_close(layer(x), layer(plain), rtol=1e-12, atol=1e-12)


@every_layer
@both_modes
def test_the_input_may_be_given_by_its_name(name: str, training: bool) -> None:
    layer, x = case(name, training)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x=x), layer(x))


@every_layer
@both_modes
def test_an_empty_batch_gives_an_empty_answer(name: str, training: bool) -> None:
    layer, x = case(name, training)
    empty = x[:0].requires_grad_()
    y = layer(empty)
    assert y.shape == (0, *layer(x).shape[1:])
    y.sum().backward()
    assert empty.grad.shape == empty.shape
    assert all(p.grad is None or not p.grad.any() for p in layer.parameters())


def test_parametrized_layers_take_per_sample_gradients_and_penalties() -> None:
    layer = parametrize_cayley(nn.Linear(4, 3)).double()
    function, values = as_function(layer)
    x = torch.randn(2, 4, dtype=torch.float64, generator=seeded(), requires_grad=True)
    assert torch.autograd.gradgradcheck(function, [x, *(v.requires_grad_() for v in values)], fast_mode=True)


@every_layer
def test_a_training_step_in_torch_waits_for_no_number(name: str) -> None:
    # On a GPU each of these stops the host until the device has caught up, and none may be in a CUDA graph.
    waits = {"item", "_local_scalar_dense", "is_nonzero", "nonzero", "equal", "unique", "_linalg_check_errors"}
    build, shape = LAYERS[name]
    layer = build(generator=seeded())
    x = torch.randn(shape, generator=seeded(1), requires_grad=True)
    with use_backend("torch"):
        layer(x).sum().backward()  # fills the tables that are kept for a size
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            layer(x).sum().backward()
    found = set()
    for event in profile.events():
        above, name = event.cpu_parent, event.name.removeprefix("aten::")
        while above is not None and above.name != "aten::linalg_lu_solve":  # looks at its pivots on a CPU only
            above = above.cpu_parent
        found |= {name} if above is None else set()
    assert "sum" in found
    assert not found & waits
