"""The faster layout is chosen by the clock, and nothing else of the model changes."""

from __future__ import annotations

import itertools

import pytest
import torch

from espalier.errors import EspalierError
from espalier.models import ConvMixer, choose_memory_format_, memory_format


@pytest.mark.parametrize(("slow", "chosen"), [(0, "channels_last"), (1, "contiguous")])
def test_the_faster_layout_wins_and_the_model_is_left_as_it_was(
    slow: int, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ConvMixer(16, 2, 5, 2)
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    # A clock on which every other step, those of one layout, takes 2 s instead of 1.
    ticks = itertools.accumulate(itertools.cycle([0.0, 2.0 - slow, 0.0, 1.0 + slow]))
    monkeypatch.setattr(memory_format.time, "perf_counter", lambda: next(ticks))
    stream = torch.get_rng_state()
    choice = choose_memory_format_(model, torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    assert torch.get_rng_state().equal(stream)
    assert choice.name == ("contiguous" if slow else "channels_last")
    assert sorted(choice.seconds.values()) == [1.0, 2.0]
    assert f"memory format {chosen}" in str(choice)
    weight = model.blocks[0][1].weight
    assert weight.is_contiguous(memory_format=choice.memory_format)
    assert all(tensor.equal(state[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad.equal(g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}


def test_bad_input_is_refused_in_one_line() -> None:
    model = ConvMixer(16, 1, 3, 2)
    with pytest.raises(EspalierError, match="rounds is 0"):
        choose_memory_format_(model, torch.randn(2, 3, 8, 8), rounds=0)
    with pytest.raises(EspalierError, match="give a batch of images"):
        choose_memory_format_(model, torch.randn(3, 8, 8))
