"""A generator decides every initial weight of a model that is built by its name."""

from __future__ import annotations

import torch

from espalier.checkpoints import open_host_model


def weights(seed: int) -> torch.Tensor:
    model = open_host_model("espalier:convmixer", torch.Generator().manual_seed(seed))
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_the_generator_decides_the_weights_and_the_global_state_stays() -> None:
    torch.rand(3)  # wherever the global state stands
    before = torch.get_rng_state()
    first = weights(1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert torch.equal(weights(1), first)
    assert not torch.equal(weights(2), first)
