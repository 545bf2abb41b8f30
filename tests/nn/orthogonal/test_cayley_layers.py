"""Cayley layers as parts of a program: never stale, copied, saved, compiled, exported, loaded from the original."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from espalier.errors import EspalierError
from espalier.models import KWLarge, OrthogonalConvNet
from espalier.nn import (
    CayleyConv2d,
    CayleyConvTranspose2d,
    CayleyLinear,
    load_original_state_dict,
)
from espalier.nn.lipschitz.activations import GroupSort
from needs import INDUCTOR
from reference.cayley_original import OriginalCayleyConv, OriginalCayleyLinear
from rounding import assert_equal_up_to_rounding


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_net() -> nn.Sequential:
    g = seeded()
    return nn.Sequential(
        CayleyConv2d(3, 8, 3, generator=g), nn.ReLU(), CayleyConv2d(8, 4, 3, 2, padding_mode="zeros", generator=g),
        CayleyConv2d(4, 4, 1, generator=g), nn.Flatten(), CayleyLinear(36, 5, generator=g),
    )  # fmt: skip


def images(batch: int = 2, size: int = 6) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=seeded(7))


def fresh_answer(net: nn.Module, x: Tensor) -> Tensor:
    """Return what a new net with these weights says in evaluation."""
    other = small_net().eval()
    other.load_state_dict(net.state_dict())
    return other(x)


def assert_same_answers(net: nn.Module, x: Tensor, ours: Tensor, theirs: Tensor) -> None:
    """Assert that two evaluations of ``net`` differ by rounding alone, whatever products they take.

    The longest way through ``small_net``: twice 6 + 6 terms there and back and 8 channels, then 4 and 36, less than 150
    with the biases. Orthogonal layers lengthen nothing, so no vector is longer than s = ‖x‖ + Σ‖bias at every pixel‖;
    the matrices of moduli, which rounding sees, are longer by at most the root of their 36 columns. The matrices
    themselves are made in float64.
    """
    biases = sum(float(p.detach().norm()) * 6 for name, p in net.named_parameters() if name.endswith("bias"))
    longest = float(x.detach().flatten(1).norm(dim=1).max()) + biases
    assert_equal_up_to_rounding(ours, theirs, terms=150, scale=36**0.5 * longest)


def step(net: nn.Module) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    net(images()).square().sum().backward()
    optimizer.step()


def load(net: nn.Module) -> None:
    net.load_state_dict({name: 1.5 * value for name, value in net.state_dict().items()})


@torch.no_grad()
def swap_by_copy(net: nn.Module) -> None:
    for p in net.parameters():
        p.copy_(p.roll(1))


def swap_through_data(net: nn.Module) -> None:
    for p in net.parameters():
        p.data.copy_(p.data.roll(1))  # leaves no trace in the version counter


def replace_data(net: nn.Module) -> None:
    for p in net.parameters():
        p.data = p.data.roll(1)


@pytest.mark.parametrize("change", [step, load, swap_by_copy, swap_through_data, replace_data])
@pytest.mark.parametrize("grad", [True, False])
def test_evaluation_uses_present_parameters(change: Callable[[nn.Module], None], grad: bool) -> None:
    net, x = small_net().eval(), images()
    with torch.set_grad_enabled(grad):
        before = net(x)
    change(net)
    with torch.set_grad_enabled(grad):
        after = net(x)
    assert (after - before).abs().max() > 0.1
    assert_same_answers(net, x, after, fresh_answer(net, x))


def test_evaluation_builds_once_for_each_size_and_takes_sizes_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    import espalier.nn.orthogonal.conv as module

    built = []
    original = module.spectrum
    monkeypatch.setattr(module, "spectrum", lambda taps, size: built.append(size) or original(taps, size))
    layer = CayleyConv2d(3, 3, 3, generator=seeded()).eval()
    answers = {size: layer(images(size=size)) for size in (5, 6, 8)}
    for size in (8, 5, 6, 5, 8):
        torch.testing.assert_close(layer(images(size=size)), answers[size], atol=1e-5, rtol=0)
    assert built == [(5, 5), (6, 6), (8, 8)]
    layer.train()
    for size in (8, 5):
        torch.testing.assert_close(layer(images(size=size)), answers[size], atol=1e-5, rtol=0)
    assert len(built) == 3


def test_evaluation_gives_gradients_of_the_input_and_of_the_weights() -> None:
    net, x = small_net(), images().requires_grad_()
    train = torch.autograd.grad(net(x).square().sum(), [x, *net.parameters()])
    net.eval()(x)
    for mine, other in zip(torch.autograd.grad(net(x).square().sum(), [x, *net.parameters()]), train, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)
    frozen = net.requires_grad_(False)
    (alone,) = torch.autograd.grad(frozen(x).square().sum(), x)
    torch.testing.assert_close(alone, train[0], atol=1e-4, rtol=1e-4)


def test_inference_mode_leaves_a_usable_cache() -> None:
    net, x = small_net().eval(), images()
    with torch.inference_mode():
        inside = net(x)
    y = net(x.requires_grad_())
    y.sum().backward()
    assert_same_answers(net, x, y, inside)


def test_copies_and_files_hold_parameters_alone() -> None:
    net, x = small_net().eval(), images()
    size = len(pickle.dumps(net))
    y = net(x)
    assert len(pickle.dumps(net)) == size
    assert set(net.state_dict()) == {name for name, _ in net.named_parameters()}
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert_same_answers(net, x, copied(x), y)
        swap_through_data(copied)
        assert (copied(x) - y).abs().max() > 0.1
    assert_same_answers(net, x, net(x), y)
    torch.testing.assert_close(net.double()(x.double()).float(), y, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler's own
@pytest.mark.parametrize("training", [True, False])
def test_compiled_net_is_the_same_function_with_the_same_gradients(training: bool) -> None:
    net, x = small_net().train(training), images()
    compiled = torch.compile(net, backend="aot_eager")
    for size in (6, 6):
        x = images(size=size)
        ours, theirs = compiled(x), net(x)
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    gradients = [torch.autograd.grad(y.square().sum(), list(net.parameters())) for y in (ours, theirs)]
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)
    swap_through_data(net)
    torch.testing.assert_close(compiled(x), net(x), atol=1e-6, rtol=0)


@INDUCTOR
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.parametrize("dynamic", [None, True])
def test_inductor_compiles_layers_of_many_shapes(dynamic: bool | None) -> None:
    torch.compiler.reset()
    net = KWLarge(width=4, hidden=16, img_size=8)
    compiled = torch.compile(net, dynamic=dynamic)
    for batch in (2, 3):
        x = torch.randn(batch, 3, 8, 8, generator=seeded(batch), requires_grad=True)
        wanted = [x, *net.parameters()]
        ours, theirs = (torch.autograd.grad(model(x).square().sum(), wanted) for model in (compiled, net))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_exported_program_is_the_same_function_and_follows_its_weights(strict: bool) -> None:
    net, x = small_net().eval(), images()
    program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=strict)
    for batch in (x, torch.cat([x, x])):
        torch.testing.assert_close(program.module()(batch), net(batch), atol=1e-5, rtol=0)
    held = io.BytesIO()
    torch.export.save(program, held)
    held.seek(0)
    again = torch.export.load(held).module()
    load(net)
    again.load_state_dict(net.state_dict())
    torch.testing.assert_close(again(x), net(x), atol=1e-5, rtol=0)


EXPORTED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv": (lambda: CayleyConv2d(3, 8, 3, stride=2, padding_mode="zeros"), (2, 3, 6, 6)),
    "transposed": (lambda: CayleyConvTranspose2d(8, 3, 3, stride=2), (2, 8, 4, 4)),
    "linear": (lambda: CayleyLinear(6, 5), (2, 6)),
    "sorted": (lambda: nn.Sequential(GroupSort(2), CayleyConv2d(4, 4, 3)), (2, 4, 5, 5)),
    "kwlarge": (lambda: KWLarge(width=4, hidden=16, img_size=8), (2, 3, 8, 8)),
    "convnet": (lambda: OrthogonalConvNet(widths=(4,), depths=(1,), hidden=16, img_size=8), (2, 3, 8, 8)),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")  # the exporter's, of shapes that it does not fold
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # the graph holds for one image size, as it should
@pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", EXPORTED)
def test_onnx_graphs_give_the_same_answers_for_any_batch(name: str, dynamo: bool, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    if dynamo:
        pytest.importorskip("onnxscript")
    make, shape = EXPORTED[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = make().eval()
    x, path = torch.randn(shape, generator=seeded(1)), tmp_path / "net.onnx"
    if dynamo:
        batch = ({0: torch.export.Dim("batch")},)
        torch.onnx.export(net, (x,), path, dynamo=True, input_names=["x"], dynamic_shapes=batch, verbose=False)
    else:
        torch.onnx.export(net, (x,), path, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "batch"}})
    assert {node.domain for node in onnx.load(path).graph.node} <= {"", "ai.onnx"}
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for other in (x, torch.randn(5, *shape[1:], generator=seeded(2)), x[:1]):
        (answer,) = session.run(None, {"x": other.numpy()})
        torch.testing.assert_close(torch.from_numpy(answer), net(other).detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("inputs", "outputs"), [(6, 6), (4, 7), (7, 4)])
def test_linear_is_the_original_one(inputs: int, outputs: int) -> None:
    theirs = OriginalCayleyLinear(inputs, outputs).double()
    ours = CayleyLinear(inputs, outputs, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 2, inputs, generator=seeded(), dtype=torch.float64)
    expected = dict(theirs.named_parameters())
    for training in (True, False):
        y = ours.train(training)(x)
        assert (y - theirs(x)).abs().max() < 1e-12
        mine = torch.autograd.grad(y.square().sum() + y.sum(), list(ours.parameters()))
        again = theirs(x)
        other = torch.autograd.grad(
            again.square().sum() + again.sum(), [expected[n] for n, _ in ours.named_parameters()]
        )
        for one, two in zip(mine, other, strict=True):
            assert (one - two).abs().max() < 1e-10


def test_linear_refuses_wrong_widths() -> None:
    with pytest.raises(EspalierError, match="in_features is 0"):
        CayleyLinear(0, 3)
    with pytest.raises(EspalierError, match="input is"):
        CayleyLinear(4, 3)(torch.zeros(2, 3))
    with pytest.raises(EspalierError, match=r"dtype torch\.complex64"):
        CayleyLinear(4, 3, dtype=torch.complex64)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layer", [
    CayleyLinear(4, 3), CayleyConv2d(4, 3, 3), CayleyConv2d(4, 3, 1), CayleyConv2d(4, 6, 3, 2, "zeros", groups=2),
    CayleyConvTranspose2d(4, 3, 3), CayleyConvTranspose2d(4, 6, 1, 2, groups=2),
], ids=repr)  # fmt: skip
def test_a_bias_is_one_number_an_output(layer: nn.Module, training: bool) -> None:
    x = torch.rand((10, 4) if isinstance(layer, CayleyLinear) else (10, 4, 4, 4))
    outputs = layer.train(training)(x).shape[1]
    for wrong in ((outputs + 2,), (1,), (10 * outputs,), (outputs, 1), ()):
        other = copy.deepcopy(layer)
        other.bias = nn.Parameter(torch.zeros(wrong))
        with pytest.raises(EspalierError, match=rf"bias is \({', '.join(map(str, wrong))},?\): give \({outputs},\)"):
            other(x)


def test_loads_the_original_net_as_the_same_function() -> None:
    torch.manual_seed(0)
    theirs = nn.Sequential(
        OriginalCayleyConv(3, 8, 3, size=8), nn.ReLU(), OriginalCayleyConv(8, 12, 3, size=8, stride=2), nn.Flatten(),
        OriginalCayleyLinear(192, 5),
    ).double()  # fmt: skip
    for layer in theirs:
        if hasattr(layer, "alpha"):
            layer.alpha.data *= 1.5
    ours = nn.Sequential(
        CayleyConv2d(3, 8, 3), nn.ReLU(), CayleyConv2d(8, 12, 1, 2), nn.Flatten(), CayleyLinear(192, 5)
    ).double()
    x = images(size=8).double()
    load_original_state_dict(ours, theirs.state_dict(), x)
    assert ours.training
    assert (ours(x) - theirs(x)).abs().max() < 1e-10
    with pytest.raises(EspalierError, match=r"no '0.alpha'"):
        load_original_state_dict(ours, {"0.weight": theirs[0].weight}, x)
    with pytest.raises(EspalierError, match=r"0.alpha is \(3,\) there"):
        load_original_state_dict(ours, {**theirs.state_dict(), "0.alpha": torch.ones(3)}, x)
    ours[2] = CayleyConv2d(8, 12, 3, 2).double()
    with pytest.raises(EspalierError, match=r"2.weight is .* halves"):
        load_original_state_dict(ours, theirs.state_dict(), x)


@pytest.mark.parametrize(
    ("kernel", "size", "options"),
    [
        (3, 2, {}),
        (5, 4, {}),
        (3, 7, {}),
        (1, 5, {}),
        (3, 8, {"dilation": 2}),
        (3, 8, {"padding_mode": "zeros"}),
        (1, 6, {"stride": 3}),
    ],
)
def test_refuses_layers_that_would_not_be_the_original_function(
    kernel: int, size: int, options: dict[str, object]
) -> None:
    ours = nn.Sequential(CayleyConv2d(3, 4, kernel, **options))
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(EspalierError, match="original"):
        load_original_state_dict(ours, {"0." + k: v + 1 for k, v in ours[0].state_dict().items()}, images(size=size))
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())
