"""Every hand-written operator under every kind of derivative: twice, forward, batched, per sample, and of graphs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.functional import jacobian, vhp
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from espalier.errors import EspalierError
from espalier.models import ConvMixer
from espalier.nn import (
    DepthwiseConv2d,
    GatedRMSNorm,
    Mamba1,
    Mamba2,
    causal_conv_silu,
    selective_scan,
    ssd,
    use_backend,
)
from espalier.nn.kernels.backend import backend

BACKENDS = ("torch", "compiled") if backend("cpu").name == "compiled" else ("torch",)


class Scan(nn.Module):
    """The Mamba-1 recurrence with all its inputs as parameters but x."""

    def __init__(self) -> None:
        super().__init__()
        self.delta, self.a = nn.Parameter(torch.rand(5, 3)), nn.Parameter(-torch.rand(3, 2))
        self.b, self.c = nn.Parameter(torch.randn(5, 2)), nn.Parameter(torch.randn(5, 2))
        self.d, self.state = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        delta, b, c, state = (t.expand(len(x), *t.shape) for t in (self.delta, self.b, self.c, self.state))
        y, final = selective_scan(
            x,
            delta,
            self.a,
            b,
            c,
            self.d,
            gate_BLE=x.sin(),
            initial_state=state,
            delta_softplus=True,
            return_state=True,
        )
        return torch.cat([y.flatten(1), final.flatten(1)], 1)


class Dual(nn.Module):
    """The Mamba-2 recurrence likewise, in two groups and several chunks."""

    def __init__(self) -> None:
        super().__init__()
        self.delta, self.a = nn.Parameter(torch.rand(5, 4)), nn.Parameter(-torch.rand(4))
        self.b, self.c = nn.Parameter(torch.randn(5, 2, 2)), nn.Parameter(torch.randn(5, 2, 2))
        self.d, self.state = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        delta, b, c, state = (t.expand(len(x), *t.shape) for t in (self.delta, self.b, self.c, self.state))
        x = x.unflatten(2, (4, 3))
        y, final = ssd(x, delta, self.a, b, c, self.d, initial_state=state, return_state=True, chunk_size=2)
        return torch.cat([y.flatten(1), final.flatten(1)], 1)


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return causal_conv_silu(x, self.weight, self.bias)


class Norm(GatedRMSNorm):
    def forward(self, y: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(y, y)  # one tensor in both places


def mixer() -> nn.Module:
    return ConvMixer(4, 1, 3, 2, 3, num_classes=3)


PARTS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "scan": (Scan, (2, 5, 3)),
    "ssd": (Dual, (2, 5, 12)),
    "causal convolution": (Convolution, (2, 6, 3)),
    "gated norm": (lambda: Norm(6, 2), (2, 3, 6)),
    "depthwise convolution": (lambda: DepthwiseConv2d(3, 3), (2, 3, 4, 5)),
    "ConvMixer in evaluation": (lambda: mixer().eval(), (2, 3, 6, 6)),
    "ConvMixer in training": (mixer, (3, 3, 6, 6)),
    "Mamba-1": (lambda: Mamba1(4, 2), (2, 5, 4)),
    "Mamba-2": (lambda: Mamba2(4, 2, head_dim=4), (2, 5, 4)),
}
TRANSFORMED = [name for name in PARTS if name != "ConvMixer in training"]  # whose statistics torch.func must not change


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape = PARTS[name]
    net = make().double()
    for parameter in net.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return net, torch.randn(shape, dtype=torch.float64)


@pytest.fixture(params=BACKENDS, autouse=True)
def chosen(request: pytest.FixtureRequest) -> object:
    with use_backend(request.param):
        yield


@pytest.mark.parametrize("name", PARTS)
def test_gradients_can_be_differentiated(name: str) -> None:
    net, x = made(name)
    parameters = dict(net.named_parameters())

    def function(x: Tensor, *values: Tensor) -> Tensor:
        buffers = {key: buffer.clone() for key, buffer in net.named_buffers()}
        return functional_call(net, {**dict(zip(parameters, values, strict=True)), **buffers}, (x,))

    inputs = [t.detach().requires_grad_() for t in (x, *parameters.values())]
    assert torch.autograd.gradgradcheck(function, inputs, atol=1e-4, rtol=1e-3, fast_mode=True)


@pytest.mark.parametrize("name", TRANSFORMED)
@pytest.mark.parametrize("twice", [False, True])
def test_checkpointed_gradients_are_those_without(name: str, twice: bool) -> None:
    # Checkpointing computes what was kept again, and hands each tensor out a single time.
    net, x = made(name)
    x.requires_grad_()
    outputs = net(x), checkpoint(net, x, use_reentrant=False)
    plain, again = (torch.autograd.grad(y.square().sum(), x, create_graph=twice)[0] for y in outputs)
    torch.testing.assert_close(plain, again)


@pytest.mark.parametrize("name", PARTS)
def test_a_penalty_on_gradients_counts_for_the_parameters_that_are_asked_for(name: str) -> None:
    net, x = made(name)
    parameters = [p for p in net.parameters() if p.requires_grad]

    def penalised(strength: float) -> list[Tensor]:
        z = x.clone().requires_grad_()
        loss = net(z).square().sum()
        (slope,) = torch.autograd.grad(loss, z, create_graph=True)
        found = torch.autograd.grad(loss + strength * slope.square().sum(), parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]

    changes = [b - a for a, b in zip(penalised(0.0), penalised(1.0), strict=True)]
    # By differences of the slope along one random direction of all parameters.
    ways, step = [torch.randn_like(p) for p in parameters], 1e-5
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, way in zip(parameters, ways, strict=True):
                parameter.add_(way, alpha=sign * step)
        z = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(net(z).square().sum(), z)
        values.append(float(slope.square().sum()))
        with torch.no_grad():
            for parameter, way in zip(parameters, ways, strict=True):
                parameter.sub_(way, alpha=sign * step)
    expected = (values[0] - values[1]) / (2 * step)
    found = sum(float((change * way).sum()) for change, way in zip(changes, ways, strict=True))
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5 * max(values))


@pytest.mark.parametrize("name", TRANSFORMED)
def test_forward_derivatives_are_those_of_differences(name: str) -> None:
    net, x = made(name)
    way = torch.randn_like(x)
    with torch.no_grad():
        truth = (net(x + 1e-6 * way) - net(x - 1e-6 * way)) / 2e-6
    _, slope = jvp(net, (x,), (way,))
    torch.testing.assert_close(slope, truth, atol=1e-6, rtol=1e-5)
    _, curved = vhp(lambda z: net(z).square().sum(), x, way)
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(net(leaf).square().sum(), leaf, create_graph=True)
    torch.testing.assert_close(curved, torch.autograd.grad((first * way).sum(), leaf)[0])


@pytest.mark.parametrize("name", TRANSFORMED)
def test_gradients_come_one_a_sample_and_many_at_once(name: str) -> None:
    net, x = made(name)
    parameters = {key: value.detach() for key, value in net.named_parameters()}

    def loss(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(net, values, (sample[None],)).square().sum()

    each = vmap(grad(loss), (None, 0))(parameters, x)
    for index, sample in enumerate(x):
        alone = torch.autograd.grad(net(sample[None]).square().sum(), list(net.parameters()), allow_unused=True)
        for (key, _), one in zip(net.named_parameters(), alone, strict=True):
            if one is not None:
                torch.testing.assert_close(each[key][index], one)
    torch.testing.assert_close(jacobian(net, x, vectorize=True), jacobian(net, x))


@pytest.mark.parametrize("name", TRANSFORMED)
def test_gradients_of_a_graph_that_exists_come_many_at_once_and_forward(name: str) -> None:
    net, x = made(name)
    x.requires_grad_()
    y = net(x)

    def back(dy: Tensor) -> Tensor:
        return torch.autograd.grad(y, x, dy, retain_graph=True)[0]

    ways = torch.randn(3, *y.shape, dtype=torch.float64)
    each = torch.stack([back(way) for way in ways])
    torch.testing.assert_close(vmap(back)(ways), each)
    if name in ("scan", "Mamba-1") and backend("cpu").name == "torch":
        return  # the gate is torch's SiLU there, whose gradient has no forward derivative
    with forward_ad.dual_level():
        _, slope = forward_ad.unpack_dual(back(forward_ad.make_dual(ways[0], ways[1])))
        torch.testing.assert_close(slope, each[1])


@pytest.mark.parametrize("name", ["Mamba-1", "Mamba-2"])
def test_nets_in_a_stack_have_the_gradients_of_each(name: str) -> None:
    nets = [made(name)[0] for _ in range(2)]
    nets[1].out_proj.weight.data.mul_(2)
    x = torch.randn(2, 40, 4, dtype=torch.float64)
    parameters, buffers = stack_module_state(nets)
    vmap(lambda p, b: functional_call(nets[0], (p, b), (x,)))(parameters, buffers).square().sum().backward()
    for index, net in enumerate(nets):
        net(x).square().sum().backward()
        for key, parameter in net.named_parameters():
            torch.testing.assert_close(parameters[key].grad[index], parameter.grad)


@pytest.mark.parametrize("name", ["Mamba-1", "Mamba-2"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_graphs_that_were_made_without_gradients_can_be_trained(name: str) -> None:
    net = made(name)[0].float()
    x = torch.randn(2, 150, 4)
    expected = torch.autograd.grad(net(x).square().sum(), net.in_proj.weight)[0]
    with torch.no_grad():
        graphs = [torch.export.export(net, (x,)).module()]
        if backend("cpu").name != "torch":  # which writes in place in a trace, and torch refuses to train that
            graphs.append(torch.jit.trace(net, (x,), check_trace=False))
    for graph in graphs:
        weight = graph.in_proj.weight
        found = torch.autograd.grad(graph(x).square().sum(), weight)[0]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_shapes_that_do_not_fit_are_refused_before_memory_is_read() -> None:
    one = torch.ones
    norm = GatedRMSNorm(4)
    refused: list[tuple[Callable[[], object], str]] = [
        (lambda: norm(one(1, 2, 8), one(1, 2, 8)), "4 channels"),
        (lambda: norm(one(1, 300, 4), one(1, 3, 4)), "do not broadcast"),
        (lambda: norm(one(1, 2, 4), one(1, 2, 4, device="meta")), "use one device"),
        (lambda: GatedRMSNorm(8, groups=3), "8 channels do not fall into 3 groups"),
        (lambda: causal_conv_silu(one(1, 2, 8), one(4, 4)), "give .B, L, C. and .C, K."),
        (lambda: causal_conv_silu(one(1, 2, 8), one(8, 4), one(1)), "one number a channel"),
        (lambda: causal_conv_silu(one(1, 2, 8), one(8, 4), history=one(2, 3, 8)), "history is"),
        (
            lambda: selective_scan(one(1, 3, 2), one(1, 3, 2, device="meta"), -one(2, 2), one(1, 3, 2), one(1, 3, 2)),
            "one",
        ),
        (lambda: causal_conv_silu(one(1, 2, 8, dtype=torch.int64), one(8, 4)), "int64"),
        (lambda: causal_conv_silu(one(1, 2, 8), one(8, 4), history=one(1, 3, 8, dtype=torch.complex64)), "complex64"),
    ]
    for call, words in refused:
        with pytest.raises(EspalierError, match=words):
            call()
    wide = norm(torch.randn(2, 3, 4), torch.randn(1, 3, 4))
    assert wide.shape == (2, 3, 4)
    assert norm(one(4), one(4)).shape == (4,)


class Signs(TorchFunctionMode):
    """Takes every weight of a convolution for its signs."""

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if function in (torch.conv2d, torch.nn.functional.conv2d):
            args = (args[0], args[1].sign(), *args[2:])
        return function(*args, **(kwargs or {}))


def test_what_changes_convolutions_from_outside_is_not_passed_by(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = made("ConvMixer in evaluation")
    twin, _ = made("ConvMixer in evaluation")
    for module in twin.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data.sign_()
    expected = twin(x)
    with Signs():
        torch.testing.assert_close(net(x), expected)
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, z: self._conv_forward(z, self.weight.sign(), self.bias))
    torch.testing.assert_close(net(x), expected)
