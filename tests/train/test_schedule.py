from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from standins import recipe

from espalier.train.schedule import learning_rate


@given(epochs=st.integers(1, 30), steps=st.integers(1, 20), lr=st.floats(1e-5, 1.0))
@settings(deadline=None, max_examples=50)
def test_piecewise_is_the_papers_interpolation(epochs: int, steps: int, lr: float) -> None:
    run = recipe(schedule="piecewise", epochs=epochs, lr=lr)
    total = epochs * steps
    ours = [learning_rate(run, t, steps) for t in range(total)]
    # The original script: np.interp at (epoch + (i + 1) / steps).
    at = [t // steps + (t % steps + 1) / steps for t in range(total)]
    theirs = np.interp(at, [0, epochs * 2 / 5, epochs * 4 / 5, epochs], [0, lr, lr / 20, 0])
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12 * lr)


@given(epochs=st.integers(1, 12), steps=st.integers(1, 20), warmup=st.floats(0, 1))
@settings(deadline=None, max_examples=50)
def test_cosine_after_a_linear_warmup(epochs: int, steps: int, warmup: float) -> None:
    run = recipe(schedule="cosine", epochs=epochs, warmup_epochs=warmup * epochs, lr=0.3)
    total, first = epochs * steps, round(warmup * epochs * steps)
    for t in range(total):
        if t < first:
            expected = 0.3 * (t + 1) / first
        else:
            expected = 0.15 * (1 + math.cos(math.pi * (t - first) / (total - first)))
        assert learning_rate(run, t, steps) == pytest.approx(expected, rel=1e-12)


def test_constant_after_warmup() -> None:
    run = recipe(schedule="constant", epochs=2, warmup_epochs=0.5, lr=0.4)
    assert [learning_rate(run, t, 4) for t in range(8)] == pytest.approx([0.2] + [0.4] * 7)
