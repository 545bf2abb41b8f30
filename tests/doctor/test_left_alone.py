"""What a look at a model must leave alone, whatever its layers keep, draw from and hang on hooks."""

from __future__ import annotations

import random
from collections import Counter, defaultdict, deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import espalier

DIM = 24


class Norm(nn.Module):
    """A norm of one's own that counts, keeps and draws from every kind of generator."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(DIM))
        self.shapes: list[Any] = []
        self.last: deque[Any] = deque(maxlen=3)
        self.calls: Counter[str] = Counter()
        self.kept: dict[str, list[Any]] = defaultdict(list)
        self.totals = np.zeros(2)
        self.torch_own = torch.Generator().manual_seed(1)
        self.numpy_own, self.python_own = np.random.default_rng(0), random.Random(3)

    def forward(self, x: Tensor) -> Tensor:
        self.shapes.append(x.shape)
        self.last.append(x.shape)
        self.calls["n"] += 1
        self.kept["sizes"].append(float(x.detach().norm()))
        self.totals += 1
        torch.rand(1, generator=self.torch_own)
        self.numpy_own.random(), self.python_own.random()
        torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight

    def state(self) -> str:
        own = (self.torch_own.get_state().tolist(), self.numpy_own.bit_generator.state, self.python_own.getstate())
        return repr((self.shapes, self.last, self.calls, self.kept, self.totals, own))


def drawn_from() -> str:
    return repr((torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1:3]))  # noqa: NPY002


@pytest.mark.parametrize("example", [None, torch.randn(4, 16, DIM, generator=torch.Generator().manual_seed(0))])
def test_what_layers_keep_and_draw_from_is_as_before(example: Tensor | None) -> None:
    model = nn.Sequential(nn.Linear(DIM, DIM), Norm(), nn.Linear(DIM, DIM))
    before, drawn = model[1].state(), drawn_from()
    espalier.diagnose(model, example=example)
    assert model[1].state() == before
    assert drawn_from() == drawn


def test_no_hook_runs_unless_the_model_is_asked_to_run() -> None:
    model, calls = nn.Sequential(nn.Linear(DIM, DIM), Norm()), []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    model[1].register_forward_pre_hook(lambda *_: calls.append(2))
    espalier.diagnose(model)
    assert not calls
    model(torch.ones(2, DIM))
    assert calls == [2, 1]


class Tied(nn.Module):
    """A language model that says of itself that its head is its embedding."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.config = {"tie_word_embeddings": True}
        self.embedding, self.head = nn.Embedding(17, DIM), nn.Linear(DIM, 17, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("constrain", [parametrizations.spectral_norm, parametrizations.orthogonal])
def test_a_parametrised_head_is_tied_by_what_it_is_computed_from(constrain: Any, tied: bool) -> None:
    model = Tied(tied=tied).train()
    constrain(model.head)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = [finding.severity for finding in espalier.diagnose(model).findings if finding.check == "tied"]
    assert found == ([] if tied else ["error"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Unattached(nn.Sequential):
    """Properties that hold nothing until somebody attaches it raise, as those of Lightning's modules do."""

    @property
    def config(self) -> Any:
        raise RuntimeError("not attached")

    in_features = in_channels = embed_dim = is_causal = num_heads = stride = is_cross_attention = config
    pretrained_cfg = default_cfg = input_size = main_input_name = num_classes = vocab_size = base_layer = config
    _tied_weights_keys = module = _orig_mod = config


@pytest.mark.parametrize("example", [None, "synthetic", torch.ones(4, 16, DIM)])
def test_properties_that_raise_end_nothing(example: Any) -> None:
    def model(kind: type[nn.Sequential]) -> nn.Sequential:
        torch.manual_seed(0)
        inner = nn.Sequential(nn.Linear(DIM, DIM), nn.TransformerEncoderLayer(DIM, 3, 48, batch_first=True))
        return kind(kind(*inner))

    plain, own = model(nn.Sequential), model(Unattached)
    checks = [[f.check for f in espalier.diagnose(each, example=example).findings] for each in (plain, own)]
    assert checks[0] == checks[1]
    reports = [espalier.structure_(each, generator=torch.Generator().manual_seed(0)) for each in (plain, own)]
    assert reports[0] == reports[1]
    assert espalier.audit(own).layers[0].status == "present"
    for a, b in zip(plain.parameters(), own.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("example", [None, "synthetic"])
def test_a_compiled_module_inside_a_wrapper_is_no_traceback(example: Any) -> None:
    model = nn.DataParallel(torch.compile(nn.TransformerEncoderLayer(DIM, 3, 48, batch_first=True), backend="eager"))
    assert espalier.diagnose(model, example=example).ok


def test_a_lazy_parameter_is_in_no_group_of_an_optimiser() -> None:
    model = nn.Sequential(nn.Linear(DIM, DIM), nn.LazyLinear(3))
    for held, where in ((model[0], ["1.bias", "1.weight"]), (model, [])):
        optimizer = torch.optim.SGD(held.parameters(), 0.1)
        found = [f.layer for f in espalier.diagnose(model, optimizer=optimizer).findings if f.check == "optimizer"]
        assert sorted(found) == where
    other = torch.optim.SGD([*nn.LazyLinear(3).parameters(), *model.parameters()], 0.1)
    found = [f.measured for f in espalier.diagnose(model, optimizer=other).findings if f.check == "optimizer"]
    assert found == ["2 of its 6 parameters are not the model's"]


class InPlace(nn.Module):
    """A model that normalises what it is given in place."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mul_(2).add_(1))


@pytest.mark.parametrize("learns", [False, True])
def test_a_batch_that_the_model_writes_into_is_as_before(learns: bool) -> None:
    x = torch.randn(32, DIM).requires_grad_(learns)
    before, model = x.detach().clone(), InPlace()
    for example in (x, {"x": x}, (x, torch.zeros(32, dtype=torch.long))):
        assert espalier.diagnose(model, example=example).ok
    assert torch.equal(x.detach(), before)
    assert x.grad is None
