"""Near-identity matrices and their factors against full SVDs in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.errors import EspalierError
from espalier.init.attention.near_identity import near_identity, near_identity_factors, split_square
from reference.attention_reference import best_approximation


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("noise", ["normal", "uniform"])
def test_entries_have_the_stated_mean_and_variance(noise: str) -> None:
    dim, alpha, beta = 400, 0.7, -0.3
    matrix = near_identity(dim, alpha, beta, noise=noise, generator=seeded(0)).double()
    z = (matrix - beta * torch.eye(dim)) / alpha
    count = dim * dim
    assert abs(z.mean()) < 5 / (dim * count) ** 0.5
    assert float(z.var() * dim) == pytest.approx(1.0, abs=5 * (2 / count) ** 0.5)


@settings(deadline=None, max_examples=15)
@given(dim=st.integers(4, 40), data=st.data(), beta=st.sampled_from([-0.4, 0.0, 0.7]), seed=st.integers(0, 99))
def test_exact_factors_are_the_best_approximation(dim: int, data: st.DataObject, beta: float, seed: int) -> None:
    rank = data.draw(st.integers(1, dim))
    target = near_identity(dim, 0.7, beta, generator=seeded(seed))
    left, right = near_identity_factors(dim, rank, 0.7, beta, method="exact", generator=seeded(seed))
    torch.testing.assert_close((left @ right.mT).double(), best_approximation(target, rank), atol=1e-5, rtol=0)
    # Balanced: neither factor carries more than the other.
    torch.testing.assert_close(left.norm(), right.norm(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("dim", "rank", "alpha", "beta"),
    [(256, 32, 0.7, 0.7), (512, 64, 0.7, 0.7), (768, 64, 0.3, 0.7), (640, 20, 0.7, -0.3)],
)
def test_fast_path_captures_the_energy_and_the_diagonal(dim: int, rank: int, alpha: float, beta: float) -> None:
    exact = near_identity_factors(dim, rank, alpha, beta, method="exact", generator=seeded(1))
    fast = near_identity_factors(dim, rank, alpha, beta, method="fast", generator=seeded(1))
    target = near_identity(dim, alpha, beta, generator=seeded(1))
    optimum = (exact[0] @ exact[1].mT).square().sum()
    # What a rank-k matrix P captures of A is ‖A‖² − ‖A − P‖².
    captured = target.square().sum() - (target - fast[0] @ fast[1].mT).square().sum()
    assert float(captured / optimum) >= 0.995
    assert float((fast[0] * fast[1]).sum()) == pytest.approx(float((exact[0] * exact[1]).sum()), rel=0.02)


@pytest.mark.parametrize("dim", [3, 64, 200])
def test_square_split_is_exact_and_balanced(dim: int) -> None:
    matrix = near_identity(dim, 0.4, -0.4, generator=seeded(2))
    left, right = split_square(matrix)
    torch.testing.assert_close(left @ right.mT, matrix, atol=1e-5, rtol=0)
    assert float(left.norm() / right.norm()) == pytest.approx(1.0, rel=1e-2)


def test_generator_decides_and_the_global_state_is_left_alone() -> None:
    state = torch.random.get_rng_state()
    one = near_identity_factors(300, 20, 0.7, 0.7, generator=seeded(3))
    two = near_identity_factors(300, 20, 0.7, 0.7, generator=seeded(3))
    assert torch.equal(one[0], two[0])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_bad_input_is_one_line() -> None:
    with pytest.raises(EspalierError, match="rank 9 is outside 1…8"):
        near_identity_factors(8, 9, 0.7, 0.7)
    with pytest.raises(EspalierError, match="did you mean 'normal'"):
        near_identity(8, 0.7, 0.7, noise="norml")
    with pytest.raises(EspalierError, match="unknown method"):
        near_identity_factors(8, 2, 0.7, 0.7, method="quick")  # type: ignore[arg-type]
