"""Near-identity matrices and their factors against full SVDs in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.errors import EspalierError
from espalier.init.attention.near_identity import near_identity, near_identity_factors, random_frame, split_square
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


@settings(deadline=None, max_examples=20)
@given(dim=st.integers(1, 30), data=st.data(), seed=st.integers(0, 99))
def test_frames_have_orthonormal_columns(dim: int, data: st.DataObject, seed: int) -> None:
    count = data.draw(st.integers(1, dim))
    frame = random_frame(dim, count, generator=seeded(seed))
    torch.testing.assert_close(frame.mT @ frame, torch.eye(count, dtype=torch.float64), atol=1e-13, rtol=0)


def test_frames_are_uniform() -> None:
    # Entries of a uniform orthogonal matrix of width 3: mean 0, squares 1/3, fourth powers 1/5; half are rotations.
    g, count = seeded(0), 20000
    frames = torch.stack([random_frame(3, 3, generator=g) for _ in range(count)])
    slack = 5 / count**0.5
    for power, moment in ((1, 0.0), (2, 1 / 3), (3, 0.0), (4, 1 / 5)):
        assert (frames.pow(power).mean(0) - moment).abs().max() < slack
    assert torch.linalg.det(frames).mean().abs() < slack
    # ⟨q₁₁ q₂₂ q₃₃⟩ = 0 and ⟨q₁₁ q₂₂ q₁₂ q₂₁⟩ = −1/30.
    assert (frames[:, 0, 0] * frames[:, 1, 1] * frames[:, 2, 2]).mean().abs() < slack
    assert (frames[:, 0, 0] * frames[:, 1, 1] * frames[:, 0, 1] * frames[:, 1, 0]).mean() == pytest.approx(
        -1 / 30, abs=slack
    )


def test_wide_factors_of_full_rank_are_turned_copies_of_one_draw() -> None:
    dim, alpha, beta = 640, 0.4, -0.4
    one, two, exact = (
        left @ right.mT
        for left, right in (
            near_identity_factors(dim, dim, alpha, beta, generator=seeded(1)),
            near_identity_factors(dim, dim, alpha, beta, generator=seeded(2)),
            near_identity_factors(dim, dim, alpha, beta, method="exact", generator=seeded(1)),
        )
    )
    spectra = [torch.linalg.svdvals(product) for product in (one, two, exact)]
    torch.testing.assert_close(spectra[0], spectra[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(spectra[0], spectra[2], atol=0.02, rtol=0)
    noise = [(product - beta * torch.eye(dim)) * dim**0.5 / alpha for product in (one, two)]
    for z in noise:
        assert abs(z.mean()) < 5 / dim
        assert float(z.var()) == pytest.approx(1, abs=5 * 2**0.5 / dim)
    # Different seeds turn it to different directions.
    assert abs((noise[0] * noise[1]).mean()) < 5 / dim


def test_generator_decides_and_the_global_state_is_left_alone() -> None:
    state = torch.random.get_rng_state()
    one = near_identity_factors(300, 20, 0.7, 0.7, generator=seeded(3))
    two = near_identity_factors(300, 20, 0.7, 0.7, generator=seeded(3))
    assert torch.equal(one[0], two[0])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_bad_input_is_one_line() -> None:
    with pytest.raises(EspalierError, match="dim is 0"):
        near_identity(0, 1.0, 1.0)
    with pytest.raises(EspalierError, match="rank 9 is outside 1…8"):
        near_identity_factors(8, 9, 0.7, 0.7)
    with pytest.raises(EspalierError, match="did you mean 'normal'"):
        near_identity(8, 0.7, 0.7, noise="norml")
    with pytest.raises(EspalierError, match="unknown method"):
        near_identity_factors(8, 2, 0.7, 0.7, method="quick")  # type: ignore[arg-type]
