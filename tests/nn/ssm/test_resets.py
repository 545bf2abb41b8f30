"""One strong step among weak ones: what comes after it keeps its digits, whatever is summed together with it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from espalier.nn import Mamba1, Mamba2, mixing_matrix, ssd, use_backend
from needs import IMPLEMENTATIONS
from reference.ssd_reference import ssd_loop

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}


def largest_error(ours: Tensor, theirs: Tensor) -> float:
    """Measured at every token by the size of its own numbers, not by that of the strong one's."""
    over = tuple(range(2, theirs.ndim))
    scale = theirs.abs().amax(over, keepdim=True) if over else theirs.abs()
    assert ours.isfinite().all()
    return ((ours.double() - theirs).abs() / scale.clamp_min(1)).max().item()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 10**6), length=st.integers(2, 150), chunk=st.sampled_from([1, 5, 64, 1000]),
    strong=st.lists(st.tuples(st.floats(0, 1), st.floats(1, 7)), min_size=1, max_size=4), wide=st.booleans(),
    states=st.booleans(),
)  # fmt: skip
def test_equals_the_loop_in_float64_at_every_token(
    implementation: str, seed: int, length: int, chunk: int, strong: list[tuple[float, float]], wide: bool, states: bool
) -> None:
    generator, dtype = torch.Generator().manual_seed(seed), torch.float64 if wide else torch.float32
    x, b, c = (torch.randn(2, length, n, 4, generator=generator) for n in (2, 1, 1))
    delta, a = torch.rand(2, length, 2, generator=generator) * 0.1, torch.tensor([-16.0, -0.3])
    for where, power in strong:  # in the head that soon forgets what comes with it
        delta[seed % 2, int(where * (length - 1)), 0] = 10**power
    weights = [torch.randn(2, length, 2, 4, generator=generator), torch.randn(2, 2, 4, 4, generator=generator)]
    first = torch.randn(2, 2, 4, 4, generator=generator) if states else None
    given = [t for t in (x, delta, a, b, c, first) if t is not None]

    def run(recurrence: object, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        leaves = [t.to(dtype).requires_grad_() for t in given]
        state = leaves[5] if states else None
        if recurrence is ssd:
            made = ssd(*leaves[:5], initial_state=state, return_state=True, chunk_size=chunk)
        else:
            made = ssd_loop(*leaves[:5], None, state)
        outputs = [*made][: 2 if states else 1]
        grads = torch.autograd.grad(outputs, leaves, [w.to(dtype) for w in weights[: len(outputs)]])
        return outputs, list(grads)

    with use_backend(implementation):
        ours = run(ssd, dtype)
    # Where large numbers cancel, a loop in the same precision loses digits, too.
    loop, theirs = run(ssd_loop, dtype), run(ssd_loop, torch.float64)
    for one, two, three in zip(*([*made[0], *made[1]] for made in (ours, loop, theirs)), strict=True):
        assert largest_error(one, three) <= max(TOLERANCE[dtype], 20 * largest_error(two, three))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rate", [-math.inf, -1e30])
def test_a_rate_beyond_all_numbers_forgets_everything(implementation: str, rate: float) -> None:
    g = torch.Generator().manual_seed(0)
    x, b, c = (torch.randn(1, 9, n, 3, generator=g) for n in (2, 1, 1))
    delta, a = torch.rand(1, 9, 2, generator=g) + 0.1, torch.tensor([rate, -1.0])
    with use_backend(implementation):
        y = ssd(x, delta, a, b, c, chunk_size=4)
    own = (c * b).sum(-1)[..., None] * delta[..., None] * x  # a token gives to itself alone
    torch.testing.assert_close(y[:, :, 0], own[:, :, 0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(y.double(), ssd_loop(x, delta, a, b, c)[0].double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("make", [Mamba1, Mamba2])
@pytest.mark.parametrize("big", [1.0, 100.0, 1e4, 1e6])
def test_a_mixer_step_by_step_is_the_mixer_on_the_whole(implementation: str, make: type, big: float) -> None:
    mixer = make(8, 8, generator=torch.Generator().manual_seed(0), **({"head_dim": 4} if make is Mamba2 else {}))
    x = torch.randn(1, 40, 8, generator=torch.Generator().manual_seed(1))
    if make is Mamba2:  # Δ of every head is softplus(first number − 5)
        with torch.no_grad():
            mixer.A_log.fill_(math.log(16))
            mixer.in_proj.weight[-mixer.num_heads :] = 0
            mixer.in_proj.weight[-mixer.num_heads :, 0] = 1
            mixer.dt_bias.fill_(-5)
        x[..., 0] = 0
    x[:, 8, 0] = big
    with use_backend(implementation), torch.no_grad():
        whole, state, steps = mixer(x), mixer.empty_state(1), []
        for token in x.unbind(1):
            y, state = mixer.step(token, state)
            steps.append(y)
        wide = mixer.double()(x.double())
    away = [*range(8), *range(12, 40)]  # from the tokens whose short convolution sees the large one
    for ours in (whole, torch.stack(steps, 1)):
        assert largest_error(ours[:, away], wide[:, away]) <= 1e-4


@pytest.mark.parametrize("big", [1.0, 1e4, 1e6])
def test_the_mixing_matrix_after_a_long_step(big: float) -> None:
    mixer = Mamba2(8, 8, head_dim=4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mixer.in_proj.weight[-mixer.num_heads :] = 0
        mixer.in_proj.weight[-mixer.num_heads :, 0] = 1
        mixer.dt_bias.fill_(-5)
    x = torch.randn(1, 30, 8, generator=torch.Generator().manual_seed(1))
    x[..., 0] = 0
    x[:, 8, 0] = big
    ours = mixing_matrix(mixer, x)[..., 9:, 9:]
    wide = mixing_matrix(mixer.double(), x.double())[..., 9:, 9:]
    assert (ours - wide).abs().max() <= 1e-5 * wide.abs().max()
