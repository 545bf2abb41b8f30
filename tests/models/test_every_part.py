"""Every layer and model on what torch's own take: odd dtypes and devices, traces, batches of gradients, no examples."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian

from espalier import nn as enn
from espalier.models import ConvMixer, KWLarge, OrthogonalConvNet, SequenceModel, VisionTransformer
from espalier.models.lipschitz import LipschitzNet
from espalier.nn import use_backend
from espalier.nn.orthogonal.spectrum.dft import _keep

IMAGES = (2, 4, 6, 6)


class Mixer(ConvMixer):
    """By plain operations: its kernels have tests of their own."""

    def forward(self, x: Tensor) -> Tensor:
        with use_backend("torch"):
            return super().forward(x)


def small_net(features: list[nn.Module]) -> LipschitzNet:
    return LipschitzNet([*features, nn.Flatten()], 144, 3, "normalized")


PARTS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: enn.CayleyLinear(4, 6), (3, 4)),
    "linear-wide": (lambda: enn.CayleyLinear(6, 4), (3, 6)),
    "conv1d": (lambda: enn.CayleyConv1d(4, 2, 3), (2, 4, 5)),
    "conv2d": (lambda: enn.CayleyConv2d(4, 4, 3), IMAGES),
    "conv2d-tall": (lambda: enn.CayleyConv2d(4, 6, 3, padding_mode="zeros", groups=2), IMAGES),
    "conv2d-strided": (lambda: enn.CayleyConv2d(4, 4, 3, stride=2), IMAGES),
    "conv2d-one-tap": (lambda: enn.CayleyConv2d(4, 4, 1, stride=2), IMAGES),
    "conv3d": (lambda: enn.CayleyConv3d(2, 1, 2), (2, 2, 2, 3, 2)),
    "transposed": (lambda: enn.CayleyConvTranspose2d(4, 2, 3, stride=2), (2, 4, 2, 3)),
    "parametrized": (lambda: enn.parametrize_cayley(nn.Linear(4, 6)), (3, 4)),
    "maxmin": (enn.MaxMin, IMAGES),
    "groupsort": (lambda: enn.GroupSort(2), IMAGES),
    "abs": (enn.Abs, IMAGES),
    "householder": (lambda: enn.Householder(4), IMAGES),
    "normalize": (lambda: enn.Normalize([0.1, 0.2, 0.3, 0.4], 0.5), IMAGES),
    "centering": (lambda: enn.BatchCentering(4), IMAGES),
    "normalized-linear": (lambda: enn.NormalizedLinear(4, 6), (3, 4)),
    "downsampling": (lambda: enn.InvertibleDownsampling(2), IMAGES),
    "average": (lambda: enn.ScaledAvgPool2d(2), IMAGES),
    "average-all": (enn.ScaledAvgPool2d, IMAGES),
    "norms": (lambda: enn.L2Pool2d(2), IMAGES),
    "convex-sum": (lambda: enn.ConvexSum(nn.Conv2d(4, 4, 1)), IMAGES),
    "residual": (lambda: enn.LinearResidual(4), IMAGES),
    "KWLarge": (lambda: KWLarge(4, 8, 8, num_classes=3), (2, 3, 8, 8)),
    "OrthogonalConvNet": (lambda: OrthogonalConvNet((4,), (1,), hidden=8, img_size=8), (2, 3, 8, 8)),
    "LipschitzNet": (lambda: small_net([enn.Normalize(0.5), enn.ConvexSum(enn.LinearResidual(4))]), IMAGES),
    "LipschitzNet-centred": (lambda: small_net([enn.CayleyConv2d(4, 4, 3), enn.BatchCentering(4)]), IMAGES),
    "ConvMixer": (lambda: Mixer(8, 1, 3, 2, 3, num_classes=4), (2, 3, 8, 8)),
    "VisionTransformer": (lambda: VisionTransformer(8, 4, embed_dim=16, depth=1, num_heads=2), (2, 3, 8, 8)),
    "cls-token": (lambda: VisionTransformer(8, 4, embed_dim=16, depth=1, num_heads=2, pool="cls"), (2, 3, 8, 8)),
    "SequenceModel": (lambda: SequenceModel(16, 16, "attention*2", mlp_ratio=2), (2, 5)),
}
every_part = pytest.mark.parametrize("name", PARTS)
both_modes = pytest.mark.parametrize("training", [True, False])


def make(name: str, training: bool = False, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return PARTS[name][0]().train(training)


def example(name: str, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = PARTS[name][1]
    if name == "SequenceModel":
        return torch.randint(16, shape, generator=generator)
    return torch.randn(shape, generator=generator)


@every_part
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_integers_are_refused_or_taken_for_the_numbers_they_are(name: str, dtype: torch.dtype) -> None:
    part = make(name)
    whole = (3 * example(name).abs()).to(dtype) if name != "SequenceModel" else example(name).to(dtype)
    try:
        found = part(whole)
    except (RuntimeError, ValueError):
        return
    wanted = part(whole if name == "SequenceModel" else whole.double().float())
    torch.testing.assert_close(found.to(wanted.dtype), wanted)


@every_part
@pytest.mark.filterwarnings("error:Casting complex values")
def test_complex_numbers_are_refused_or_kept(name: str) -> None:
    if name == "SequenceModel":
        return
    part, x = make(name), example(name)
    turned = x * (0.6 + 0.8j)
    try:
        real, found = part(x), part(turned)
    except (RuntimeError, ValueError, TypeError, NotImplementedError):
        return
    assert not torch.allclose(found, part(turned.real).to(found.dtype)) or name in ("abs", "norms")
    assert found.shape == real.shape


@pytest.mark.parametrize("name", ["linear", "conv2d", "conv2d-one-tap", "transposed", "KWLarge", "OrthogonalConvNet"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int32, torch.complex64])
@both_modes
def test_orthogonal_layers_name_a_dtype_that_they_do_not_take(name: str, dtype: torch.dtype, training: bool) -> None:
    with pytest.raises(ValueError, match=str(dtype).removeprefix("torch.")) as caught:
        make(name, training)(example(name).to(dtype))
    assert "\n" not in str(caught.value)


@every_part
@both_modes
def test_meta_tells_the_shape(name: str, training: bool) -> None:
    with torch.device("meta"):
        part = PARTS[name][0]().train(training)
    assert all(tensor.is_meta for tensor in (*part.parameters(), *part.buffers()))
    x, wanted = example(name), make(name, training)(example(name))
    found = part(x.to("meta"))
    assert (found.is_meta, found.shape, found.dtype) == (True, wanted.shape, wanted.dtype)
    if found.requires_grad:
        found.sum().backward()
        assert all(p.grad is None or p.grad.shape == p.shape for p in part.parameters())
    assert "meta" not in str(part)


@every_part
@both_modes
def test_another_default_device_changes_nothing(name: str, training: bool) -> None:
    part, x = make(name, training), example(name)
    plain = copy.deepcopy(part)
    _keep.cache_clear()  # tables that another test made
    with torch.device("meta"):
        found = part(x)
    torch.testing.assert_close(found, plain(x))
    with torch.device("meta"):
        if hasattr(part, "init_weights"):
            part.init_weights()
        if hasattr(part, "reset_classifier"):
            part.reset_classifier(2)
    assert not any(tensor.is_meta for tensor in (*part.parameters(), *part.buffers()))


@every_part
@both_modes
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_parts_made_under_another_default_dtype_take_it(name: str, training: bool, dtype: torch.dtype) -> None:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        part, x = make(name, training), example(name)
        found = part(x.to(dtype) if x.is_floating_point() else x)
    finally:
        torch.set_default_dtype(before)
    assert {tensor.dtype for tensor in (found, *part.parameters(), *part.buffers())} - {torch.int64} == {dtype}


@every_part
@pytest.mark.parametrize("assign", [True, False])
def test_a_net_made_on_meta_is_the_one_whose_weights_it_loads(name: str, assign: bool) -> None:
    with torch.device("meta"):
        part = PARTS[name][0]()
    trained, x = make(name), example(name)
    if not assign:
        part.to_empty(device="cpu")
        for tensor in (*part.parameters(), *part.buffers()):
            tensor.detach().fill_(7)  # what empty memory may hold
    part.eval().load_state_dict(trained.state_dict(), assign=assign)
    torch.testing.assert_close(part(x), trained(x))
    assert len(list(part.parameters())) == len(list(trained.parameters()))
    for again in (copy.deepcopy(part), pickle.loads(pickle.dumps(part)) if name[0].isupper() else part):
        again.load_state_dict(trained.state_dict())
        torch.testing.assert_close(again(x), trained(x))


@pytest.mark.slow
@every_part
def test_a_net_exported_in_training_can_be_saved_and_loaded(name: str) -> None:
    part, x, file = make(name, True), example(name), io.BytesIO()
    torch.export.save(torch.export.export(part, (x,)), file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(x), part(x))


@every_part
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_net_that_was_of_another_dtype_is_the_one_that_it_saves(name: str, dtype: torch.dtype) -> None:
    part, again, x = make(name).to(dtype).float(), make(name, seed=2), example(name)
    again.load_state_dict(part.state_dict())
    torch.testing.assert_close(again(x), part(x))


@every_part
def test_no_parameter_is_a_scalar_and_those_of_older_checkpoints_are_taken(name: str) -> None:
    part, again, x = make(name), make(name, seed=2), example(name)
    assert all(parameter.ndim for parameter in part.parameters())  # FSDP2 shards none
    single = {name for name, parameter in part.named_parameters() if parameter.shape == (1,)}
    scalars = {key: t.reshape(()) if key in single else t for key, t in part.state_dict().items()}
    for assign in (False, True):
        again.load_state_dict(scalars, assign=assign)
        torch.testing.assert_close(again(x), part(x))


# Not the ConvMixer: its backward pass would leave the backend of the class above.
@pytest.mark.parametrize("name", [n for n in PARTS if hasattr(make(n), "set_grad_checkpointing") and n != "ConvMixer"])
def test_checkpointing_changes_no_gradient_and_no_buffer(name: str) -> None:
    plain, kept, x = make(name, True), make(name, True), example(name)
    kept.set_grad_checkpointing()
    for part in (plain, kept):
        part(x).square().sum().backward()
    for one, other in zip(plain.parameters(), kept.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    for one, other in zip(plain.buffers(), kept.buffers(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", [name for name in PARTS if name[0].isupper() or name == "cls-token"])
def test_a_net_made_on_meta_can_be_drawn(name: str) -> None:
    with torch.device("meta"):
        part = PARTS[name][0]()
    part.to_empty(device="cpu")
    for parameter in part.parameters():
        parameter.detach().fill_(float("nan"))
    part.init_weights()
    assert all(parameter.isfinite().all() for parameter in part.parameters())
    plain = make(name)
    assert {n: p.shape for n, p in part.named_parameters()} == {n: p.shape for n, p in plain.named_parameters()}
    for (key, found), (_, wanted) in zip(part.named_buffers(), plain.named_buffers(), strict=True):
        torch.testing.assert_close(found, wanted, msg=key)


@every_part
@both_modes
def test_a_trace_follows_its_weights(name: str, training: bool) -> None:
    first, second, x = make(name, training), make(name, training, seed=2), example(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(copy.deepcopy(first), (x,), check_trace=False)
    other = example(name, seed=3)
    torch.testing.assert_close(traced(other), copy.deepcopy(first)(other), rtol=1e-4, atol=1e-4)
    traced.load_state_dict({**traced.state_dict(), **second.state_dict()})  # a trace keeps every buffer
    torch.testing.assert_close(traced(other), second(other), rtol=1e-4, atol=1e-4)


@every_part
@both_modes
def test_batches_of_gradients_are_those_of_a_loop(name: str, training: bool) -> None:
    part, x = make(name, training).double(), example(name)
    if name == "SequenceModel":
        wanted = list(part.parameters())
    else:
        x = x.double().requires_grad_()
        wanted = [x, *part.parameters()]
    y = part(x)
    directions = torch.randn(3, *y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        found = torch.autograd.grad(y, wanted, directions, retain_graph=True, is_grads_batched=True)
        loop = [torch.autograd.grad(y, wanted, one, retain_graph=True) for one in directions]
        torch.testing.assert_close(list(found), [torch.stack(parts) for parts in zip(*loop, strict=True)])
        if x.is_floating_point() and not training:
            one = x[:1].detach()
            torch.testing.assert_close(jacobian(part, one, vectorize=True), jacobian(part, one))


@pytest.mark.parametrize("name", ["linear", "conv1d", "conv2d", "conv2d-strided", "conv2d-one-tap", "maxmin"])
@both_modes
def test_batches_of_gradients_are_differentiable(name: str, training: bool) -> None:
    part, x = make(name, training).double(), example(name).double().requires_grad_()
    wanted = [x, *part.parameters()]
    y = part(x).sin()
    directions = torch.randn(2, *y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))

    def again(gradients: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(sum(g.cos().sum() for g in gradients), wanted, retain_graph=True)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        found = again(list(torch.autograd.grad(y, wanted, directions, create_graph=True, is_grads_batched=True)))
    loop = again([g for one in directions for g in torch.autograd.grad(y, wanted, one, create_graph=True)])
    torch.testing.assert_close(list(found), list(loop))


@every_part
@both_modes
def test_an_empty_batch_gives_an_empty_answer_and_spoils_nothing(name: str, training: bool) -> None:
    part, x = make(name, training), example(name)
    shape = copy.deepcopy(part)(x).shape
    y = part(x[:0])
    assert y.shape == (0, *shape[1:])
    if y.requires_grad:
        y.sum().backward()
    assert all(buffer.isfinite().all() for buffer in part.buffers())


@every_part
@both_modes
def test_autocast_is_taken(name: str, training: bool) -> None:
    part, x = make(name, training), example(name)
    wanted = copy.deepcopy(part)(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = part(x)
    torch.testing.assert_close(found.float(), wanted, rtol=0.05, atol=0.1)
