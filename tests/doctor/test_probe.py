"""The probe on models and batches that are legitimate and unusual: it says nothing of them, and changes nothing."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import espalier
from espalier.errors import EspalierError
from espalier.models import ConvMixer, SequenceModel


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class Layer(nn.Module):
    """A linear layer, and what a function makes of it and of the first argument."""

    def __init__(self, function: Callable[[nn.Linear, Tensor], object]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.function = nn.Linear(16, 16), function

    def forward(self, x: Tensor) -> object:
        """Return whatever the function makes."""
        return self.function(self.linear, x)


def attention(linear: nn.Linear, x: Tensor, **keywords: Tensor) -> Tensor:
    h = linear(x)
    return F.scaled_dot_product_attention(query=h, key=h, value=h, **keywords)


@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning", "ignore:The PyTorch API of nested:UserWarning")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.jagged])
def test_tensors_of_other_layouts_pass_through(layout: torch.layout) -> None:
    if layout is torch.jagged:
        x = torch.nested.nested_tensor([noise(3, 16), noise(5, 16)], layout=layout)
        model: nn.Module = nn.Sequential(Layer(lambda linear, x: linear(x)), nn.ReLU(), nn.Tanh())
    else:
        x = torch.eye(16).to_sparse(layout=layout)
        model = Layer(lambda linear, x: torch.sparse.mm(torch.relu(x), linear.weight) + linear.bias)
    assert not espalier.diagnose(model, x).findings


@pytest.mark.parametrize(
    "function",
    [
        attention,
        lambda linear, x: attention(linear, x, attn_mask=torch.ones(x.shape[-2], dtype=torch.bool)),
        lambda linear, x: linear(x) + F.relu(x[..., :0]).sum(),
        lambda linear, x: torch.fft.fft(linear(x)),
    ],
    ids=["arguments by name", "a mask of one dimension", "a rectifier without units", "complex outputs"],
)
def test_operators_are_watched_however_they_are_called(function: Callable[[nn.Linear, Tensor], object]) -> None:
    assert not espalier.diagnose(Layer(function), noise(4, 32, 16)).findings


@pytest.mark.parametrize("targets", [torch.arange(32) % 2, torch.full((32,), -1), torch.full((32,), -100)])
@pytest.mark.parametrize("classes", [1, 4])
def test_targets_that_name_no_class_give_no_loss(targets: Tensor, classes: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, classes))
    assert not espalier.diagnose(model, (noise(32, 16), targets)).findings


def test_some_rows_may_be_left_out_of_the_loss() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    targets = (torch.arange(32) % 4).where(torch.arange(32) > 5, -100)
    model[2].bias.data[0] = 40.0
    x = noise(32, 16)
    loss = float(F.cross_entropy(model(x), targets).detach())
    (found,) = (f for f in espalier.diagnose(model, (x, targets)).findings if f.check == "loss")
    assert found.measured == f"loss {loss:.3g}"


class Writes(nn.Module):
    """Writes into a parameter, and draws from every generator, in each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 16, max_norm=0.1)
        self.book = nn.Parameter(noise(4, 16), requires_grad=False)
        self.register_buffer("mask", torch.ones(1).expand(16))

    def forward(self, ids: Tensor) -> Tensor:
        """Return (B, T, 16)."""
        self.book.data.mul_(0.9)
        return self.table(ids) * self.mask * (1 + random.random() + np.random.rand() + torch.rand(()))  # noqa: NPY002


def generators() -> tuple[object, ...]:
    numpy = np.random.get_state()  # noqa: NPY002
    return random.getstate(), numpy[1].tolist(), numpy[2:], torch.get_rng_state().tolist()


def test_what_a_pass_writes_and_draws_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the state of devices that the model is not on")

    model, ids = Writes(), torch.arange(20).reshape(1, 20)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = generators()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    espalier.diagnose(model, ids)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert generators() == states


@pytest.mark.parametrize("model", [nn.Linear(16, 4, device="meta"), nn.LazyLinear(4)])
def test_nothing_runs_without_storage(model: nn.Module) -> None:
    kind = type(model)
    found = espalier.diagnose(model, noise(8, 16)).findings
    assert [(f.severity, f.check) for f in found] == [("error", "empty")] * 2
    assert type(model) is kind


class Graph(nn.Module):
    """Sums the features of neighbours, as networks on graphs do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        """Return (nodes, 4)."""
        return self.head(torch.zeros_like(x).index_add(0, edges[1], self.linear(x)[edges[0]]))


def test_integers_that_a_model_cannot_do_without_are_no_targets() -> None:
    edges = torch.stack([torch.arange(32), torch.arange(32).roll(1)])
    assert not espalier.diagnose(Graph(), (noise(32, 16), edges)).findings


class Named(nn.Linear):
    """Gives itself as its own wrapped model, as a class that may or may not be wrapped does."""

    @property
    def module(self) -> nn.Module:
        """The model itself."""
        return self


def test_a_model_that_names_itself_ends() -> None:
    assert not espalier.diagnose(Named(16, 16), "synthetic").findings


class Detached(nn.Linear):
    """Has properties that raise while nothing is attached, as the trainers' do."""

    @property
    def module(self) -> nn.Module:
        """Raise."""
        raise RuntimeError("not attached")

    config = module


def test_properties_may_raise() -> None:
    assert not espalier.diagnose(Detached(16, 16), "synthetic").findings


def test_no_gradient_is_left_in_the_batch() -> None:
    x = noise(32, 16).requires_grad_()
    x.grad = torch.ones_like(x)
    assert not espalier.diagnose(nn.Linear(16, 4), x).findings
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_models_are_put_back() -> None:
    torch.manual_seed(0)
    model = torch.jit.script(nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Tanh()))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert not espalier.diagnose(model, noise(32, 16)).findings
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["kwlarge", "orthogonal_convnet"])
def test_a_batch_is_made_up_for_nets_of_orthogonal_layers(name: str) -> None:
    net = espalier.models.MODELS[name](img_size=(16, 8), in_chans=1)
    assert espalier.diagnose(net, "synthetic").findings == espalier.diagnose(net, torch.randn(4, 1, 16, 8)).findings


class Merges(nn.Module):
    """Puts a merged weight in a parameter's place in each pass, as peft's adapter of attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.update = nn.Linear(16, 16), nn.Parameter(torch.zeros(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, 16)."""
        weight = self.base.weight
        if "weight" in self.base._parameters:
            del self.base.weight
        self.base.weight = (weight + self.update) * 1.5
        return self.base(x)


def test_parameters_that_a_pass_takes_away_are_put_back() -> None:
    model = Merges()
    weight, values = model.base.weight, model.base.weight.detach().clone()
    espalier.diagnose(model, noise(20, 16))
    assert model.base.weight is weight
    assert torch.equal(weight, values)
    assert "weight" not in vars(model.base)


class Keeps(nn.Module):
    """Leaves what it computed, and a count, in attributes of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.calls = torch.nn.utils.weight_norm(nn.Linear(16, 16)), 0

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, 16)."""
        self.calls += 1
        self.last = self.first(x)
        return self.last


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_attributes_are_put_back() -> None:
    model = Keeps()
    before = [set(vars(model)), model.calls, id(model.first.weight)]
    espalier.diagnose(model, noise(20, 16))
    assert [set(vars(model)), model.calls, id(model.first.weight)] == before


class Caches(nn.Module):
    """Writes keys into a cache in place, as Llama's published code does, and keeps what every block made in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.made = nn.Linear(16, 16), [torch.zeros(2)]
        self.caches = {"keys": torch.arange(512.0).view(32, 16)}

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, 16)."""
        keys = self.caches["keys"].to(x)  # the cache itself
        keys[: len(x)] = self.first(x)
        self.made.append(keys[: len(x)])
        return keys[: len(x)] * 2


def test_caches_that_a_pass_writes_in_place_are_put_back() -> None:
    model = Caches()
    for _ in range(2):  # what belonged to the first pass's graph would stop the second
        espalier.diagnose(model, noise(20, 16))
        cache = model.caches["keys"]
        assert torch.equal(cache, torch.arange(512.0).view(32, 16))
        assert cache.is_leaf
        assert not cache.requires_grad
        assert [part.shape for part in model.made] == [(2,)]


@pytest.mark.parametrize("model", [
    ConvMixer(8, 2, kernel_size=3, patch_size=2, num_classes=4),
    SequenceModel(vocab_size=9, pattern="mamba2 mamba1", dim=32),
])  # fmt: skip
def test_checkpointed_models_are_probed(model: ConvMixer | SequenceModel) -> None:
    example = torch.arange(16).reshape(2, 8) % 9 if isinstance(model, SequenceModel) else noise(4, 3, 8, 8)
    plain = espalier.diagnose(model, example)
    model.set_grad_checkpointing(True)
    assert espalier.diagnose(model, example) == plain


def test_compiled_parts_run_as_they_were_written() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    model[2].weight.data.mul_(1e4)
    plain = espalier.diagnose(model, noise(20, 16))
    assert plain.findings
    model[0] = torch.compile(model[0], backend="eager")
    model[2].compile(backend="eager")
    assert espalier.diagnose(model, noise(20, 16)) == plain


def test_weights_of_inference_mode_are_not_probed() -> None:
    with torch.inference_mode():
        model = nn.Linear(16, 4)
    espalier.diagnose(model)
    with pytest.raises(EspalierError, match="inference_mode"):
        espalier.diagnose(model, noise(20, 16))


class Rotation(nn.Module):
    """Multiplies by the imaginary part of a complex parameter, whose gradient is therefore imaginary."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.complex(torch.ones(16), torch.ones(16)))

    def forward(self, x: Tensor) -> Tensor:
        """Scale every feature."""
        return x * self.phase.imag


def test_imaginary_gradients_count() -> None:
    assert [(found.severity, found.check) for found in espalier.diagnose(Rotation(), noise(32, 16)).findings] == [
        ("note", "unread")
    ]


def test_sparse_gradients_count() -> None:
    model = nn.Sequential(nn.Embedding(32, 16, sparse=True), nn.Linear(16, 16))
    assert not espalier.diagnose(model, torch.arange(32).view(2, 16)).findings
