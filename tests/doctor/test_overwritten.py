"""A model against the state dictionary that it should hold: its own is never held against it, a change always is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import espalier
from espalier.doctor import Finding


class Parts(nn.Module):
    """Parts called as wrappers call theirs, a tied weight, and numbers of every kind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.module, self.head = nn.Linear(16, 16), nn.Linear(16, 16, bias=False)
        self.again = nn.Linear(16, 16)
        self.head.weight = self.module.weight
        self.register_buffer("adjacency", torch.eye(16).to_sparse())
        self.register_buffer("levels", torch.linspace(-4, 4, 16).to(torch.float8_e4m3fn))
        self.register_buffer("bound", torch.tensor([torch.nan, 1.0, 2.0, torch.inf]))
        self.register_buffer("phases", torch.ones(4, dtype=torch.complex64))


def overwritten(model: nn.Module, state: dict[str, Tensor]) -> list[Finding]:
    return [f for f in espalier.diagnose(model, against=state).findings if f.check == "overwritten"]


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_model_holds_its_own_state(wrapped: bool) -> None:
    model: nn.Module = nn.DataParallel(Parts()) if wrapped else Parts()
    assert not overwritten(model, model.state_dict())


def test_a_model_with_activation_checkpoints_holds_the_state_that_it_writes() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = nn.Sequential(checkpoint_wrapper(nn.Linear(16, 16)), nn.Linear(16, 16))
    assert not overwritten(model, model.state_dict())


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", ["module.weight", "module.bias", "again.weight", "levels", "bound", "phases"])
def test_a_change_is_named_whatever_the_wrapper(wrapped: bool, name: str) -> None:
    model = Parts()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    if name == "module.weight":  # a file keeps a tied weight once, under either name
        del state["module.weight"]
    tensor = model.state_dict()[name]
    tensor.copy_((tensor.float() if tensor.itemsize == 1 else tensor).flip(0) + 1)
    if wrapped:
        state = {f"module.{key}": value for key, value in state.items()}
    (found,) = overwritten(model, state)
    assert found.severity == "error"
    assert name.endswith(found.layer)


def test_a_stored_imaginary_part_is_a_difference() -> None:
    model = nn.Linear(4, 4)
    stored = {name: torch.complex(tensor, torch.zeros_like(tensor)) for name, tensor in model.state_dict().items()}
    assert not overwritten(model, stored)
    stored["weight"][0, 0] += 0.5j
    (found,) = overwritten(model, stored)
    assert (found.severity, found.layer) == ("error", "weight")
    assert found.measured == f"{1 / 16:.0%} of its entries differ"


@pytest.mark.filterwarnings("ignore:torch.quantize")
def test_a_quantised_stored_tensor_cannot_be_compared() -> None:
    model = nn.Linear(4, 4, bias=False)
    assert not overwritten(model, {"weight": torch.quantize_per_tensor(torch.ones(4, 4), 0.1, 0, torch.qint8)})
