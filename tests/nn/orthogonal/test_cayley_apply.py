"""The Cayley transform applied to rows without being formed, against the matrix of the published formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.nn.orthogonal.transform import apply_cayley_matrix
from reference.cayley_original import original_cayley


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 5), st.sampled_from([0.0, 1.0, 30.0]), st.integers(0, 99))
def test_rows_and_gradients_are_those_of_the_formed_matrix(
    rows: int, columns: int, batch: int, size: float, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, batch, columns, dtype=torch.float64, generator=g, requires_grad=True)
    weight = (size * torch.randn(rows, columns, dtype=torch.float64, generator=g)).requires_grad_()
    upstream = torch.randn(2, batch, rows, dtype=torch.float64, generator=g)
    ours, theirs = apply_cayley_matrix(x, weight), x @ original_cayley(weight[None])[0].mT
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    wanted = torch.autograd.grad(theirs, (x, weight), upstream)
    for mine, other in zip(torch.autograd.grad(ours, (x, weight), upstream), wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_frozen_weights_still_pass_gradients_on(shape: tuple[int, int]) -> None:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, dtype=torch.float64, generator=g)
    x = torch.randn(3, shape[1], dtype=torch.float64, generator=g, requires_grad=True)
    (ours,) = torch.autograd.grad(apply_cayley_matrix(x, weight).square().sum(), x)
    (theirs,) = torch.autograd.grad((x @ original_cayley(weight[None])[0].mT).square().sum(), x)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
