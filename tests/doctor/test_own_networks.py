"""Networks of users' own code: healthy ones get no warning, and what cuts a gradient is found wherever it stands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import espalier
from espalier.doctor import Finding


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def loud(model: nn.Module, example: object = None, **keywords: object) -> list[tuple[str, str]]:
    found: tuple[Finding, ...] = espalier.diagnose(model, example, **keywords).findings  # type: ignore[arg-type]
    return [(finding.check, finding.layer) for finding in found if finding.severity != "note"]


def mlp(*, width: int = 32, outputs: int = 4) -> nn.Sequential:
    layers = nn.Linear(16, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, outputs)
    return nn.Sequential(*layers)


class Function(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """Return what the function gives."""
        return self.function(x)


def fit(model: nn.Module) -> None:
    """Train a little, so that biases leave their bound."""
    x, optimizer = torch.randn(64, 16), torch.optim.Adam(model.parameters(), 1e-2)
    targets = (x @ torch.randn(16, 4)).argmax(1)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), targets).backward()
        optimizer.step()


def test_torchs_own_start_is_fresh_whatever_was_drawn() -> None:
    fresh, fitted = [], []
    for seed in range(60):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
        fresh.append(espalier.diagnose(model).trained)
        fit(model)
        fitted.append(espalier.diagnose(model).trained)
    assert not any(fresh)
    assert sum(fitted) > 55


class Noisy(nn.Module):
    """A layer whose weight is drawn anew in every pass, from a mean and a deviation (NoisyNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight_mu = nn.Parameter(torch.randn(16, 16) / 4)
        self.weight_sigma = nn.Parameter(torch.full((16, 16), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, 16)."""
        return F.linear(x, self.weight_mu + self.weight_sigma * torch.randn_like(self.weight_mu))


def test_a_constant_deviation_beside_a_drawn_mean_is_healthy() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Noisy(), nn.ReLU(), Noisy())
    assert not loud(model, noise(32, 16))
    nn.init.constant_(model[0].weight_mu, 0.1)  # type: ignore[arg-type]
    assert ("constant", "0.weight_mu") in loud(model)


class Rows(nn.Module):
    """DETR's positions: a table of rows, drawn by rand, is added to the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.row_embed = nn.Parameter(torch.rand(8, 16))
        self.col_embed = nn.Embedding(8, 16)
        self.linear = nn.Linear(16, 16)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, 8, 16)."""
        return self.linear(x + self.row_embed + self.col_embed.weight)


def test_tables_may_be_drawn_off_centre() -> None:
    torch.manual_seed(0)
    model = Rows()
    assert not loud(model, noise(4, 8, 16))
    nn.init.uniform_(model.linear.weight)
    assert ("off-centre", "linear.weight") in loud(model)


@pytest.mark.parametrize("share", [0.0, 0.6])
@pytest.mark.parametrize("shape", [(64, 16), (4, 16, 40), (4, 16, 6, 6), (4, 16, 4, 4, 4)])
def test_dead_units_are_channels(shape: tuple[int, ...], share: float) -> None:
    torch.manual_seed(0)
    layer = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[len(shape)]
    first = layer(16, 20) if layer is nn.Linear else layer(16, 20, 1)  # type: ignore[call-arg]
    model = nn.Sequential(first, nn.ReLU())
    first.bias.data[: int(share * 20)] = -9.0  # type: ignore[index, operator, union-attr]
    assert ("dead-units", "1") in loud(model, noise(*shape)) or not share
    assert bool(share) == any(check == "dead-units" for check, _ in loud(model, noise(*shape)))


def test_units_that_are_all_on_or_off_by_chance_are_not_dead() -> None:
    alarms = []
    for seed in range(40):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
        # The pooled features of a fresh network hardly differ from image to image.
        alarms += loud(model, 1 + 1e-3 * noise(32, 16))
    assert not alarms


class Heads(nn.Module):
    """Two heads on one trunk, given as a dictionary, a tuple or a dataclass."""

    @dataclass
    class Output:
        """Logits and a value."""

        logits: Tensor
        value: Tensor

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.trunk, self.classes, self.value, self.kind = nn.Linear(16, 32), nn.Linear(32, 4), nn.Linear(32, 1), kind

    def forward(self, x: Tensor) -> object:
        """Return both outputs."""
        h = self.trunk(x).relu()
        logits, value = self.classes(h), self.value(h)
        return {"dict": {"logits": logits, "value": value}, "tuple": (logits, value)}.get(
            self.kind, self.Output(logits, value)
        )


@pytest.mark.parametrize("kind", ["dict", "tuple", "dataclass"])
@pytest.mark.parametrize("targets", [False, True])
def test_every_output_may_have_a_loss_of_its_own(kind: str, targets: bool) -> None:
    torch.manual_seed(0)
    model, x = Heads(kind), noise(32, 16)
    example = (x, torch.arange(32) % 4) if targets else x
    assert not loud(model, example)
    model.spare = nn.Linear(4, 4, bias=False)
    assert loud(model, example) == [("no-gradient", "spare.weight")]


def test_integers_that_name_no_class_are_no_classes() -> None:
    model = mlp(outputs=2)
    model[-1].bias.data = torch.tensor([25.0, 0.0])  # a mean, and the logarithm of a variance
    assert not loud(model, (noise(32, 16), torch.arange(32)))


@pytest.mark.parametrize("channels_second", [False, True])
def test_classes_are_counted_along_their_own_dimension(channels_second: bool) -> None:
    """The loss that is reported is torch's own, of sequences whose classes are the last or the second dimension."""
    torch.manual_seed(0)
    head = nn.Conv1d(16, 5, 1) if channels_second else nn.Linear(16, 5)
    head.bias.data[0] = 30.0  # type: ignore[index, operator, union-attr]
    x = noise(4, 16, 12) if channels_second else noise(4, 12, 16)
    targets = torch.arange(48).reshape(4, 12) % 5
    model = nn.Sequential(head)
    logits = model(x) if channels_second else model(x).mT
    expected = float(F.cross_entropy(logits, targets).detach())
    (found,) = (f for f in espalier.diagnose(model, (x, targets)).findings if f.check == "loss")
    assert (found.measured, found.usual) == (f"loss {expected:.3g}", "ln 5 = 1.61 before training")


class Stated(nn.Module):
    """Gives a loss of its own that is no cross entropy, as a detector's sum of several."""

    num_classes = 4

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 4)

    @dataclass
    class Output:
        """A loss and logits."""

        loss: Tensor
        logits: Tensor

    def forward(self, x: Tensor, labels: Tensor) -> Output:
        """Return the squared error times ten."""
        logits = self.linear(x)
        return self.Output(10 * F.mse_loss(logits, labels), logits)


def test_a_models_own_loss_is_compared_where_its_labels_are_classes() -> None:
    torch.manual_seed(0)
    assert not loud(Stated(), {"x": noise(32, 16), "labels": 3 * noise(32, 4)})


@pytest.mark.parametrize("last", [nn.Softmax(-1), nn.ReLU()])
def test_outputs_that_are_no_logits_are_noted(last: nn.Module) -> None:
    torch.manual_seed(0)
    model, example = mlp(), (noise(32, 16), torch.arange(32) % 4)
    assert not espalier.diagnose(model, example).findings
    found = espalier.diagnose(nn.Sequential(*model, last), example).findings
    assert [(f.severity, f.check, f.measured) for f in found] == [("note", "loss", "no output is below zero")]


CUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "round": torch.round,
    "sign": torch.sign,
    "clamp": lambda x: x.clamp(10, 20),
    "zero": lambda x: x * 0,
    "dropout": lambda x: F.dropout(x, 1.0),
    "integers": lambda x: (100 * x).long().float(),
    "detach": torch.detach,
    "item": lambda x: x * 0 + x.max().item(),
}


@pytest.mark.parametrize("place", [1, 3, 5])
@pytest.mark.parametrize("cut", list(CUTS))
def test_a_layer_whose_gradient_is_cut_is_found(cut: str, place: int) -> None:
    """The oracle: with the cut, autograd gives nothing but zeros to the weight before it."""
    torch.manual_seed(0)
    layers, x = list(mlp()), noise(32, 16)
    model = nn.Sequential(*layers[:place], Function(CUTS[cut]), *layers[place:])
    out = model(x)
    if out.requires_grad:
        out.sum().backward()
    assert not layers[0].weight.grad.any() if layers[0].weight.grad is not None else True  # type: ignore[union-attr]
    model.zero_grad()
    found = loud(model, x)
    assert found
    assert {check for check, _ in found} <= {"no-gradient", "gradients", "saturated"}
    if out.requires_grad and place < 5 and cut not in ("integers", "detach", "item"):
        assert ("no-gradient", f"{place - 1}.weight") in found


@pytest.mark.parametrize("kind", ["gain", "matrix", "scalar", "skipped at random"])
def test_branches_that_start_closed_are_reached_later(kind: str) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16)
            self.gate = nn.Parameter(torch.full((1,), float(kind != "scalar")))

        def forward(self, x: Tensor) -> Tensor:
            if kind == "skipped at random" and float(torch.rand(())) < 0.3:
                return x
            return x + self.gate * self.norm(self.last(self.first(x)))

    torch.manual_seed(0)
    model, x = nn.Sequential(*(Block() for _ in range(3))), noise(32, 16)
    if kind == "gain":
        [nn.init.zeros_(block.norm.weight) for block in model]
    if kind == "matrix":
        model = nn.Sequential(*model, nn.Linear(16, 4))
        nn.init.zeros_(model[-1].weight)  # type: ignore[arg-type]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = [pair for pair in loud(model, x) if pair[0] == "no-gradient"]
    assert not found
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Hidden(nn.Module):
    """Keeps layers where ``parameters()`` does not look."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        layers = [nn.Linear(16, 16), nn.Linear(16, 16)]
        held = {"list": layers, "dict": dict(enumerate(layers)), "tensor": torch.randn(16, 16, requires_grad=True)}
        held |= {"registered": nn.ModuleList(layers), "frozen": [layer.requires_grad_(False) for layer in layers[:0]]}
        self.held = held[kind]

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, 16)."""
        x = self.linear(x)
        if isinstance(self.held, Tensor):
            return x @ self.held
        for layer in self.held.values() if isinstance(self.held, dict) else self.held:
            x = layer(x.tanh())
        return x


@pytest.mark.parametrize("kind", ["list", "dict", "tensor", "registered", "frozen"])
def test_layers_that_are_not_registered_are_found(kind: str) -> None:
    torch.manual_seed(0)
    expected = [("optimizer", "held")] if kind in ("list", "dict", "tensor") else []
    assert loud(Hidden(kind), noise(32, 16)) == expected


def test_a_weight_that_is_far_too_small_stays_so_with_a_batch() -> None:
    torch.manual_seed(0)
    model = mlp()
    model[2].weight.data *= 1e-7  # type: ignore[operator]
    assert ("scale", "2.weight") in loud(model)
    assert ("scale", "2.weight") in loud(model, noise(32, 16))


class Positive(nn.Module):
    """Refuses a scale below zero, as distributions do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(16, 16), nn.Parameter(torch.zeros(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, 16)."""
        if bool((self.scale < 0).any()):
            raise ValueError("scale below zero")
        return self.linear(x).tanh() @ self.scale


def test_a_model_may_refuse_other_weights_than_its_start() -> None:
    torch.manual_seed(0)
    assert not loud(Positive(), noise(32, 16))


class Masked(nn.Module):
    """Takes a mask or none."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return (B, 1)."""
        if mask is not None and bool(mask.isnan().any()):
            raise ValueError("the mask came through")
        return self.linear(x)


@pytest.mark.parametrize("targets", [noise(32, 1), {"boxes": noise(32, 4)}, [1, 2]], ids=["floats", "mapping", "list"])
def test_batches_of_a_regression_are_taken(targets: object) -> None:
    """As a data loader gives them: what a model has no argument for, or stands beside a mapping, is targets."""
    torch.manual_seed(0)
    assert not loud(mlp(outputs=1), [noise(32, 16), targets])
    assert not loud(Masked(), ({"x": noise(32, 16)}, torch.full((32, 1), torch.nan)))
    with pytest.raises(ValueError, match="the mask came through"):
        espalier.diagnose(Masked(), (noise(32, 16), torch.full((32, 1), torch.nan)))
