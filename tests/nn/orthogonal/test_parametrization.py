"""Matrices of plain layers that stay orthogonal: trained, assigned, saved, and in other dtypes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize

from espalier.errors import EspalierError
from espalier.nn import cayley, parametrize_cayley


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("inputs", "outputs"), [(6, 6), (4, 7), (7, 4)])
def test_parametrized_linear_is_orthogonal_trains_and_takes_assignments(inputs: int, outputs: int) -> None:
    layer = nn.Linear(inputs, outputs).double()
    nn.init.xavier_normal_(layer.weight, generator=seeded(1))
    u, _, v = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    assert parametrize_cayley(layer) is layer
    assert (layer.weight - u @ v).abs().max() < 1e-12  # starts at the nearest orthogonal matrix
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.02)
    target = layer.weight.detach() @ cayley(torch.randn(inputs, inputs, generator=seeded(), dtype=torch.float64))
    first = (layer.weight - target).square().sum().item()
    for _ in range(200):
        optimizer.zero_grad()
        (layer.weight - target).square().sum().backward()
        optimizer.step()
    assert (layer.weight - target).square().sum().item() < 0.5 * first
    reflection = target.clone()
    reflection[0] *= -1
    for wanted in (target, reflection):
        layer.weight = wanted
        assert (layer.weight - wanted).abs().max() < 1e-12
    saved = nn.Linear(inputs, outputs).double()
    parametrize_cayley(saved).load_state_dict(layer.state_dict())
    assert torch.equal(saved.weight, layer.weight)
    parametrize.remove_parametrizations(layer, "weight")
    assert (layer.weight - reflection).abs().max() < 1e-12


@pytest.mark.parametrize("shape", [(6, 6), (40, 7), (7, 40)])
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_a_parametrized_matrix_stays_orthogonal_through_other_dtypes(
    shape: tuple[int, int], narrow: torch.dtype, wide: torch.dtype
) -> None:
    moved = parametrize_cayley(nn.Linear(*shape, bias=False)).to(narrow)
    loaded = parametrize_cayley(nn.Linear(*shape, bias=False)).to(wide)
    loaded.load_state_dict(moved.state_dict())
    for layer in (moved.to(wide), loaded):
        assert ((torch.linalg.svdvals(layer.weight.double()) - 1).abs() < 20 * torch.finfo(wide).eps).all()


def test_fake_tensors_change_their_dtype() -> None:
    [part] = parametrize_cayley(nn.Linear(6, 4)).parametrizations.weight
    with FakeTensorMode() as mode:
        part.base = mode.from_tensor(part.base)
        part.double()
    assert part.base.dtype == torch.float64


def test_a_parametrized_layer_that_leaves_meta_has_a_rotation() -> None:
    with torch.device("meta"):
        layer = parametrize_cayley(nn.Linear(6, 4))
    layer.to_empty(device="cpu")
    nn.init.zeros_(layer.parametrizations.weight.original)
    assert torch.equal(layer.weight, torch.eye(6)[:4])


def test_parametrization_refuses_what_is_no_matrix() -> None:
    with pytest.raises(EspalierError, match="CayleyConv2d"):
        parametrize_cayley(nn.Conv2d(3, 3, 3))
    with pytest.raises(EspalierError, match="no parameter 'gain'"):
        parametrize_cayley(nn.Linear(3, 3), "gain")
    # What is real here would drop an imaginary part.
    with pytest.raises(EspalierError, match=r"'weight' is torch\.complex64"):
        parametrize_cayley(nn.Linear(3, 3, dtype=torch.complex64))
    layer, lost = nn.Linear(3, 3), torch.full((3, 3), float("nan"))
    nn.init.constant_(layer.weight, float("inf"))
    with pytest.raises(EspalierError, match="give finite numbers"):
        parametrize_cayley(layer)
    assert isinstance(layer.weight, nn.Parameter)
    layer = parametrize_cayley(nn.Linear(3, 3))
    before = layer.weight.detach().clone()
    for bad, message in ((lost, "give finite numbers"), (torch.ones(3, 2), "3, 2"), (1j * before, "complex64")):
        with pytest.raises(EspalierError, match=message):
            layer.weight = bad
        assert torch.equal(layer.weight, before)
    layer.weight = -before.double()  # of another dtype: the layer keeps its own
    assert layer.weight.dtype == torch.float32
    assert torch.allclose(layer.weight, -before, atol=1e-6)
