"""The gated norm against its formula, in every implementation that runs here."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from espalier.nn import GatedRMSNorm, use_backend
from needs import IMPLEMENTATIONS, KERNELS


def formula(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    parts = []
    for part in (y * z * torch.sigmoid(z)).chunk(groups, dim=-1):
        parts.append(part / ((part**2).sum(-1, keepdim=True) / part.shape[-1] + eps) ** 0.5)
    return weight * torch.cat(parts, dim=-1)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@settings(deadline=None, max_examples=15)
@given(
    leading=st.lists(st.integers(1, 9), max_size=3), groups=st.integers(1, 3), width=st.integers(1, 40),
    sliced=st.booleans(),
)  # fmt: skip
def test_equals_the_formula(
    implementation: str, dtype: torch.dtype, tolerance: float, leading: list[int], groups: int, width: int, sliced: bool
) -> None:
    g = torch.Generator().manual_seed(width)
    dim = groups * width
    norm = GatedRMSNorm(dim, groups, eps=1e-2).to(dtype)
    y = torch.randn(*leading, dim, dtype=dtype, generator=g).requires_grad_()
    wide = torch.randn(*leading, dim + 5, dtype=dtype, generator=g).requires_grad_()
    with torch.no_grad():
        norm.weight.normal_(generator=g)
    z = wide[..., 2 : dim + 2] if sliced else wide[..., :dim].contiguous()
    cotangent = torch.randn(*leading, dim, dtype=dtype, generator=g)
    with use_backend(implementation):
        mine = norm(y, z)
    inputs = (y, wide, norm.weight)
    other = formula(y, z, norm.weight, groups, 1e-2)
    torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)
    mine_grads = torch.autograd.grad(mine, inputs, cotangent, retain_graph=True)
    for one, two in zip(mine_grads, torch.autograd.grad(other, inputs, cotangent), strict=True):
        assert (one - two).abs().max() <= tolerance * max(1.0, two.abs().max().item())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("leading", [(0,), (0, 3), (2, 0), (2, 0, 3), (0, 0)])
def test_no_rows_give_no_rows(implementation: str, leading: tuple[int, ...]) -> None:
    norm = GatedRMSNorm(6, 2)
    y, z = (torch.zeros(*leading, 6, requires_grad=True) for _ in range(2))
    with use_backend(implementation):
        out = norm(y, z)
        out.sum().backward()
    assert out.shape == y.grad.shape == z.grad.shape == (*leading, 6)
    assert not norm.weight.grad.any()


@KERNELS
def test_the_compiled_operator_passes_torchs_own_checks() -> None:
    from espalier.nn.kernels.gated_norm import gated_norm_cpu

    y, z, weight = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 6), (2, 3, 6), (6,)))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(gated_norm_cpu, (y, z, weight, 2, 1e-5), test_utils=checks)
