"""The Mamba-2 recurrence against a plain loop over time and heads, in every implementation that runs here."""

from __future__ import annotations

import importlib
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from espalier.errors import EspalierError
from espalier.nn import ssd, use_backend
from espalier.nn.ssm.ssd import ssd_step
from needs import IMPLEMENTATIONS, KERNELS
from reference.ssd_reference import ssd_loop

# The module: ``espalier.nn.ssm.ssd`` is the function of that name.
ssd_module = importlib.import_module("espalier.nn.ssm.ssd")

FLOAT32 = 2e-4  # between two runs in float32, of which each stays within 1e-4 of float64 (tested below)


def draw(
    batch: int, length: int, heads: int, width: int, groups: int, states: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, ...]:
    """Return (x, delta, a, b, c, d, initial state) with gradients asked for."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda *s: torch.randn(*s, dtype=dtype, generator=g)  # noqa: E731
    delta = torch.rand(batch, length, heads, dtype=dtype, generator=g)
    a = -2 * torch.rand(heads, dtype=dtype, generator=g)
    b, c = normal(batch, length, groups, states), normal(batch, length, groups, states)
    tensors = (normal(batch, length, heads, width), delta, a, b, c, normal(heads), normal(batch, heads, states, width))
    return tuple(t.requires_grad_() for t in tensors)


def gradients(outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(99)
    weights = [torch.randn(o.shape, dtype=torch.float64, generator=g).to(o.dtype) for o in outputs]
    return torch.autograd.grad(outputs, inputs, weights)


def assert_all_close(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], tolerance: float) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        scale = max(1.0, other.abs().max().item())
        assert mine.shape == other.shape
        assert (mine - other).abs().max().item() <= tolerance * scale


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(deadline=None, max_examples=15)
@given(
    batch=st.integers(1, 2), length=st.integers(1, 300), heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]),
    width=st.sampled_from([1, 2, 5, 20]), states=st.sampled_from([1, 3, 6, 17]),
    chunk=st.sampled_from([1, 7, 64, 1000]), together=st.sampled_from([1, 3, 1000]), bare=st.booleans(),
    keep=st.booleans(),
)  # fmt: skip
def test_equals_the_loop_in_float64(
    implementation: str, batch: int, length: int, heads: tuple[int, int], width: int, states: int, chunk: int,
    together: int, bare: bool, keep: bool,
) -> None:  # fmt: skip
    inputs = draw(batch, length, heads[0], width, heads[1], states, torch.float64, seed=length)
    size = batch * heads[0] * min(chunk, length) ** 2
    with pytest.MonkeyPatch.context() as patch, use_backend(implementation):
        patch.setattr(ssd_module, "_SEGMENT_NUMBERS", {"cpu": together * size})  # one, a few or all chunks at once
        patch.setattr(ssd_module, "_KEPT_NUMBERS", 1 << 40 if keep else 0)  # what the forward pass made, or made again
        if bare:
            inputs = inputs[:5]
            theirs, ours = ssd_loop(*inputs)[:1], (ssd(*inputs, chunk_size=chunk),)
        else:
            mask = torch.rand(batch, length, generator=torch.Generator().manual_seed(length)) > 0.2
            theirs = ssd_loop(*inputs, mask_BL=mask)
            ours = ssd(*inputs[:6], initial_state=inputs[6], mask=mask, return_state=True, chunk_size=chunk)
        assert_all_close(ours, theirs, 1e-10)
        assert_all_close(gradients(ours, inputs), gradients(theirs, inputs), 1e-10)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float32_stays_within_1e_4_of_float64(implementation: str) -> None:
    inputs = draw(2, 300, 4, 16, 2, 16, torch.float64)
    singles = tuple(t.detach().float().requires_grad_() for t in inputs)
    theirs = ssd_loop(*inputs)
    with use_backend(implementation):
        ours = ssd(*singles[:6], initial_state=singles[6], return_state=True)
    assert_all_close(ours, tuple(t.float() for t in theirs), 1e-4)
    assert_all_close(gradients(ours, singles), tuple(t.float() for t in gradients(theirs, inputs)), 1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_strong_decays_neither_overflow_nor_lose_the_gradient(implementation: str) -> None:
    # exp of minus the cumulated decay would overflow: the two factors must never be taken apart.
    inputs = draw(1, 200, 2, 3, 1, 4, torch.float32)
    strong = (*inputs[:2], torch.tensor([-50.0, -0.01]).requires_grad_(), *inputs[3:5])
    with use_backend(implementation):
        ours = (ssd(*strong),)
    theirs = ssd_loop(*strong)[:1]
    assert_all_close(ours, theirs, 1e-5)
    assert_all_close(gradients(ours, strong), gradients(theirs, strong), 1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast_does_not_touch_decays_or_states(implementation: str) -> None:
    inputs = draw(2, 100, 4, 8, 1, 8, torch.float32)
    with use_backend(implementation):
        plain = ssd(*inputs[:6])
    with use_backend(implementation), torch.autocast("cpu", dtype=torch.bfloat16):
        cast = ssd(*inputs[:6])
        half = ssd(inputs[0].bfloat16(), *inputs[1:6])
        expected = gradients((plain,), inputs[:6])
        assert_all_close(gradients((cast,), inputs[:6]), expected, FLOAT32)
    assert_all_close((cast,), (plain,), FLOAT32)
    assert half.dtype == torch.bfloat16
    assert (half.float() - plain).abs().max() < 0.05 * plain.abs().max()


def test_the_number_of_threads_changes_rounding_alone() -> None:
    inputs = draw(3, 70, 6, 20, 2, 9, torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            y = ssd(*inputs[:6])
            results.append((y, *gradients((y,), inputs[:6])))
    finally:
        torch.set_num_threads(before)
    assert_all_close(*results, FLOAT32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_state_alone_has_gradients_and_slices_are_read_in_place(implementation: str) -> None:
    x, delta, a, b, c, d, state = draw(2, 70, 2, 3, 1, 4, torch.float64)
    wide = torch.randn(2, 70, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).requires_grad_()
    x, b, c = (
        part.unflatten(-1, (-1, size)) for part, size in zip(wide.split([6, 4, 10], -1), (3, 4, 10), strict=True)
    )
    inputs = (x, delta, a, b, c[..., 3:7], d, state)
    leaves = (wide, delta, a, state)
    with use_backend(implementation):
        _, final = ssd(*inputs[:6], initial_state=state, return_state=True, chunk_size=16)
        ours = torch.autograd.grad(final.square().sum(), leaves, retain_graph=True)
    _, final = ssd_loop(*inputs)
    assert_all_close(ours, torch.autograd.grad(final.square().sum(), leaves), 1e-10)


@KERNELS
def test_the_compiled_operator_passes_torchs_own_checks() -> None:
    from espalier.nn.kernels.ssd import ssd_cpu

    x, delta, a, b, c, d, state = draw(2, 9, 4, 3, 2, 5, torch.float64)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for need_state in (True, False):
        flat = (x.flatten(2), delta, a, b.flatten(2), c.flatten(2), d, state, 2, 4, need_state, True)
        torch.library.opcheck(ssd_cpu, flat, test_utils=checks)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_mask_keeps_out_whatever_stands_in_the_padding(implementation: str, value: float) -> None:
    x, delta, a, b, c, d, state = draw(2, 9, 4, 3, 2, 5, torch.float64)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 6:], mask[1, :2] = False, False
    found = []
    for filling in (0.5, value):
        leaves = [t.detach().clone().requires_grad_() for t in (x, delta, b, c)]
        given = [t.masked_fill(~mask.view(2, 9, *[1] * (t.ndim - 2)), filling) for t in leaves]
        with use_backend(implementation):
            y, last = ssd(*given[:2], a, *given[2:], d, initial_state=state, mask=mask, return_state=True, chunk_size=4)
            assert not y[~mask].any()
            found.append([y, last, *torch.autograd.grad(y.square().sum() + last.square().sum(), [*leaves, a, d])])
    torch.testing.assert_close(*found)


def test_steps_equal_the_chunks() -> None:
    x, delta, a, b, c, d, state = (t.detach() for t in draw(2, 12, 4, 3, 2, 5, torch.float64))
    whole, last = ssd(x, delta, a, b, c, d, initial_state=state, return_state=True, chunk_size=5)
    for t in range(12):
        y, state = ssd_step(x[:, t], delta[:, t], a, b[:, t], c[:, t], d, state)
        torch.testing.assert_close(y, whole[:, t])
    torch.testing.assert_close(state, last)


def test_shapes_that_do_not_fit_are_refused_in_one_line() -> None:
    x, delta, a, b, c, _, _ = draw(1, 5, 4, 2, 2, 3, torch.float32)
    with pytest.raises(EspalierError, match=r"give \(B, L, H, P\)"):
        ssd(x, delta[..., :3], a, b, c)
    with pytest.raises(EspalierError, match=r"give both as \(B, L, G, N\)"):
        ssd(x, delta, a, b, c[..., :2])
    with pytest.raises(EspalierError, match="4 heads do not share 3 groups"):
        ssd(x, delta, a, b[:, :, :1].repeat(1, 1, 3, 1), c[:, :, :1].repeat(1, 1, 3, 1))
    with pytest.raises(EspalierError, match="4 heads do not share 0 groups"):
        ssd(x, delta, a, b[:, :, :0], c[:, :, :0])
    with pytest.raises(EspalierError, match="x is empty"):
        ssd(x[:, :0], delta[:, :0], a, b[:, :0], c[:, :0])
    with pytest.raises(EspalierError, match=r"mask is \(5,\): give it the shape \(1, 5\)"):
        ssd(x, delta, a, b, c, mask=torch.ones(5))
    with pytest.raises(EspalierError, match=r"mask is a list: give a tensor of the shape \(1, 5\)"):
        ssd(x, delta, a, b, c, mask=[[1] * 5])
    for wrong in (0, 2.0, True):
        with pytest.raises(EspalierError, match=f"chunk_size is {wrong}: give a whole number from 1"):
            ssd(x, delta, a, b, c, chunk_size=wrong)
    torch.testing.assert_close(ssd(x, delta, a, b, c, chunk_size=np.int64(2)), ssd(x, delta, a, b, c, chunk_size=2))


def test_a_step_refuses_what_would_be_broadcast() -> None:
    x, delta, a, b, c, d, state = draw(2, 5, 4, 2, 2, 3, torch.float32)
    token = {"x_BHP": x[:, 0], "delta_BH": delta[:, 0], "a_H": a, "b_BGN": b[:, 0], "c_BGN": c[:, 0], "d_H": d}
    token["state_BHNP"] = state
    whole = tuple(state.shape)
    for name, wrong, words in [
        ("state_BHNP", state[:1], rf"state is .* give it the shape {re.escape(str(whole))}"),
        ("state_BHNP", state[:, :1], rf"state is .* give it the shape {re.escape(str(whole))}"),
        ("d_H", d[:1], r"d is \(1,\): give it the shape \(4,\)"),
        ("x_BHP", x, r"give \(B, H, P\), \(B, H\), \(H,\)"),
        ("delta_BH", delta[:1, 0], r"give \(B, H, P\), \(B, H\), \(H,\)"),
        ("b_BGN", b[:1, 0], r"give both as \(B, G, N\)"),
    ]:
        with pytest.raises(EspalierError, match=words):
            ssd_step(**{**token, name: wrong})
