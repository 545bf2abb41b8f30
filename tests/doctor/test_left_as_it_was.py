"""A look at a model leaves it as it was: hooks, modules, memory, optimisers; and what the look itself must see."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import espalier
from espalier import diagnose
from espalier.errors import EspalierError


class Capturing(nn.Module):
    """Sets hooks at its first call, notes that in a flag, and makes a layer as wide as its input."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.seen, self.ready = nn.Linear(8, 8), list[Tensor](), False

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            self.body.register_forward_hook(lambda module, args, out: self.seen.append(out))
            self.out, self.ready = nn.Linear(8, 3), True
        self.seen.clear()
        return torch.as_tensor(self.out(self.body(x)))


def test_hooks_and_modules_of_the_first_call_are_not_there_twice() -> None:
    model = Capturing()
    diagnose(model, torch.randn(4, 8))
    assert not model.body._forward_hooks
    assert "out.weight" not in model.state_dict()
    model(torch.randn(4, 8))
    assert len(model.seen) == 1


def test_hidden_states_of_transformers_are_as_many_as_before() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        output_hidden_states=True,
    )  # fmt: skip
    model, ids = transformers.BertModel(config), torch.randint(50, (2, 6))
    diagnose(model, {"input_ids": ids})
    assert len(model(ids).hidden_states) == 4


@pytest.mark.parametrize("look", ["static", "with a batch", "structure", "audit"])
def test_memory_can_be_resized_as_before(look: str) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 5, groups=4), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 16, 8))
    if look == "static":
        diagnose(model)
    elif look == "with a batch":
        diagnose(model, torch.randn(4, 4, 8, 8))
    elif look == "structure":
        espalier.structure_(model, guard=True, generator=torch.Generator().manual_seed(0))
    else:
        espalier.audit(model)
    assert all(tensor.untyped_storage().resizable() for tensor in model.state_dict().values())


def test_an_optimiser_that_steps_as_gradients_arrive_does_not_step() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    optimisers = {p: torch.optim.Adam([p]) for p in model.parameters()}

    def step(parameter: Tensor) -> None:
        optimisers[parameter].step()  # type: ignore[index]
        optimisers[parameter].zero_grad()  # type: ignore[index]

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    assert diagnose(model, torch.randn(16, 8)).findings == ()
    assert not any(optimiser.state for optimiser in optimisers.values())
    model(torch.randn(16, 8)).sum().backward()
    assert all(optimiser.state for optimiser in optimisers.values())


def test_a_net_of_zeros_is_closed_also_at_its_root() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert [f.severity for f in diagnose(model).findings if f.check == "closed-twice"] == ["error"]


def test_a_table_of_one_number_is_an_error() -> None:
    model = nn.Sequential(nn.Embedding(20, 16), nn.Flatten(), nn.Linear(16 * 3, 2))
    nn.init.constant_(model[0].weight, 0.5)  # type: ignore[arg-type]
    found = {(f.layer, f.check): f.severity for f in diagnose(model).findings}
    assert found[("0.weight", "constant")] == "error"


def test_a_program_of_torch_export_is_diagnosed_without_a_batch() -> None:
    program = torch.export.export(nn.Linear(4, 2), (torch.randn(3, 4),)).module()
    diagnose(program)
    with pytest.raises(EspalierError, match="cannot be trained"):
        diagnose(program, torch.randn(3, 4))


def test_attention_over_one_made_up_key_is_no_fault() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.SegformerConfig(
        hidden_sizes=[8, 16, 16, 16], num_attention_heads=[1, 2, 2, 2], depths=[1, 1, 1, 1], decoder_hidden_size=16
    )
    model = transformers.SegformerForSemanticSegmentation(config)
    diagnosis = diagnose(model, "synthetic")
    assert not [f for f in diagnosis.findings if f.severity != "note"]
    model(torch.randn(1, 3, 64, 64))
