"""The bound on rounding holds for every order of a sum, and refuses what is no rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rounding import assert_equal_up_to_rounding, gamma

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@settings(deadline=None, max_examples=60)
@given(
    terms=st.integers(1, 40), dtype=st.sampled_from(DTYPES), spread=st.floats(0, 4), seed=st.integers(0, 2**31),
    scale=st.sampled_from([1e-20, 1.0, 1e12]),
)  # fmt: skip
def test_any_order_of_a_sum_is_within_the_bound_and_twice_the_bound_is_not(
    terms: int, dtype: torch.dtype, spread: float, seed: int, scale: float
) -> None:
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(terms, dtype=torch.float64, generator=g) for _ in range(2))
    x = (x * scale * torch.exp(spread * torch.randn(terms, dtype=torch.float64, generator=g))).to(dtype)
    y = y.to(dtype)
    one, two = torch.zeros((), dtype=dtype), torch.zeros((), dtype=dtype)
    for i, j in zip(range(terms), torch.randperm(terms, generator=g).tolist(), strict=True):
        one, two = one + x[i] * y[i], two + x[j] * y[j]
    size = (x.double() * y.double()).abs().sum()
    assert_equal_up_to_rounding(one, two, terms=terms, scale=size)
    shifted = one.double() + 4.1 * gamma(terms, dtype) * size
    with pytest.raises(AssertionError, match="rounding allows"):
        assert_equal_up_to_rounding(shifted, one, terms=terms, scale=size)


def test_nan_infinity_shapes_and_meaningless_bounds_are_refused() -> None:
    x = torch.ones(2, 3)
    for wrong in (float("nan"), float("inf")):
        broken = x.clone()
        broken[1, 2] = wrong
        for pair in ((broken, x), (x, broken)):
            with pytest.raises(AssertionError, match=r"at \(1, 2\)"):
                assert_equal_up_to_rounding(*pair, terms=3, scale=1.0)
    with pytest.raises(AssertionError, match="shapes"):
        assert_equal_up_to_rounding(x, x[0], terms=3)
    with pytest.raises(AssertionError, match="says nothing"):
        assert_equal_up_to_rounding(x.bfloat16(), x, terms=1000)
