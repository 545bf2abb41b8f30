"""The Mamba-1 recurrence against a plain loop, in every implementation that runs here."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from espalier.errors import EspalierError
from espalier.nn import selective_scan, use_backend
from espalier.nn.ssm.causal_conv import causal_conv_silu
from espalier.nn.ssm.selective_scan import selective_step
from needs import IMPLEMENTATIONS, KERNELS
from reference.selective_scan_reference import selective_scan_loop

FLOAT32 = 2e-4  # between two runs in float32, of which each stays within 1e-4 of float64 (tested below)


def draw(shape: tuple[int, int, int, int], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
    """Return (x, delta, a, b, c, d, initial state) with gradients asked for."""
    batch, length, channels, states = shape
    g = torch.Generator().manual_seed(seed)
    normal = lambda *s: torch.randn(*s, dtype=dtype, generator=g)  # noqa: E731
    delta = torch.rand(batch, length, channels, dtype=dtype, generator=g)
    a = -2 * torch.rand(channels, states, dtype=dtype, generator=g)
    x, b, c = normal(batch, length, channels), normal(batch, length, states), normal(batch, length, states)
    tensors = (x, delta, a, b, c, normal(channels), normal(batch, channels, states))
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
    batch=st.integers(1, 3), length=st.integers(1, 300), channels=st.integers(1, 40),
    states=st.sampled_from([1, 5, 16]), gated=st.booleans(),
)  # fmt: skip
def test_equals_the_loop_in_float64(
    implementation: str, batch: int, length: int, channels: int, states: int, gated: bool
) -> None:
    inputs = draw((batch, length, channels, states), torch.float64, seed=length)
    mask = torch.rand(batch, length, generator=torch.Generator().manual_seed(length)) > 0.2
    theirs = selective_scan_loop(*inputs, mask_BL=mask)
    wide = torch.randn(batch, length, channels + 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gate = wide.requires_grad_()[..., 3 : 3 + channels] if gated else None
    with use_backend(implementation):
        ours = selective_scan(*inputs[:6], gate_BLE=gate, initial_state=inputs[6], mask=mask, return_state=True)
    if gate is not None:
        theirs = (theirs[0] * gate * torch.sigmoid(gate), theirs[1])
        inputs = (*inputs, wide)
    assert_all_close(ours, theirs, 1e-10)
    assert_all_close(gradients(ours, inputs), gradients(theirs, inputs), 1e-10)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(deadline=None, max_examples=10)
@given(length=st.integers(1, 150), channels=st.integers(1, 40), shifted=st.booleans(), masked=st.booleans())
def test_steps_from_a_softplus_equal_the_loop(
    implementation: str, length: int, channels: int, shifted: bool, masked: bool
) -> None:
    x, delta, a, b, c, d, _ = draw((2, length, channels, 4), torch.float64, seed=length)
    logits = (delta.detach() * 55 - 40).requires_grad_()  # with the bias under 20, where torch's softplus cuts off
    bias = torch.linspace(-3, 3, channels, dtype=torch.float64).requires_grad_() if shifted else None
    mask = torch.arange(length) % 3 > 0 if masked else None
    mask = None if mask is None else mask.expand(2, length)
    steps = torch.logaddexp(logits if bias is None else logits + bias, torch.zeros((), dtype=torch.float64))
    theirs = selective_scan_loop(x, steps, a, b, c, d, mask_BL=mask)[:1]
    with use_backend(implementation):
        ours = selective_scan(x, logits, a, b, c, d, delta_bias_E=bias, delta_softplus=True, mask=mask)
    inputs = (x, logits, a, b, c, d) if bias is None else (x, logits, a, b, c, d, bias)
    assert_all_close((ours,), theirs, 1e-10)
    assert_all_close(gradients((ours,), inputs), gradients(theirs, inputs), 1e-10)


def test_small_steps_from_a_softplus_keep_their_digits() -> None:
    # One step from rest with B = C = 1: y = Δ x, down to Δ = e^−60.
    logits = torch.linspace(-60, 30, 64)[None, :, None].repeat(1, 1, 3)
    x, ones = torch.ones_like(logits), torch.ones(1, 64, 1)
    y = selective_scan(x[0, :, None], logits[0, :, None], -torch.ones(3, 1), ones[0, :, None], ones[0, :, None],
                       delta_softplus=True)  # fmt: skip
    # What float32 leaves of e^−60 = 2^−86.56: the exponent itself is rounded.
    torch.testing.assert_close(y[:, 0].double(), F.softplus(logits[0].double(), threshold=1e9), rtol=5e-6, atol=0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float32_stays_within_1e_4_of_float64(implementation: str) -> None:
    inputs = draw((2, 300, 48, 16), torch.float64)
    singles = tuple(t.detach().float().requires_grad_() for t in inputs)
    theirs = selective_scan_loop(*inputs)
    with use_backend(implementation):
        ours = selective_scan(*singles[:6], initial_state=singles[6], return_state=True)
    assert_all_close(ours, tuple(t.float() for t in theirs), 1e-4)
    expected = tuple(t.float() for t in gradients(theirs, inputs))
    assert_all_close(gradients(ours, singles), expected, 1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_long_strong_and_growing_exponents_stay_exact(implementation: str) -> None:
    # Decays from e^-60 a step to growth by e^3: the polynomial exponential must hold over its whole range.
    a = torch.tensor([[-60.0, -20.0, -1e-3, 3.0]])
    x, delta = torch.ones(1, 8, 1), torch.full((1, 8, 1), 1.0)
    b = c = torch.ones(1, 8, 4)
    with use_backend(implementation):
        y, state = selective_scan(x, delta, a, b, c, return_state=True)
    expected, last = selective_scan_loop(*(t.double() for t in (x, delta, a, b, c)))
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state.double(), last, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast_does_not_touch_decays_or_states(implementation: str) -> None:
    inputs = [t.detach() for t in draw((2, 64, 8, 4), torch.float32)]
    with use_backend(implementation):
        plain = selective_scan(*inputs[:6])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = selective_scan(*inputs[:6])
            half = selective_scan(inputs[0].bfloat16(), *inputs[1:6])
    assert_all_close((cast,), (plain,), FLOAT32)
    assert half.dtype == torch.bfloat16
    assert (half.float() - plain).abs().max() < 0.05 * plain.abs().max()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("softplus", [True, False])
def test_the_mask_keeps_out_whatever_stands_in_the_padding(implementation: str, value: float, softplus: bool) -> None:
    x, delta, a, b, c, d, state = draw((2, 9, 6, 4), torch.float64)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 6:], mask[1, :2] = False, False
    found = []
    for filling in (0.5, value):
        leaves = [t.detach().clone().requires_grad_() for t in (x, delta, b, c, x + 1)]
        first, steps, maps, reads, gate = (t.masked_fill(~mask[..., None], filling) for t in leaves)
        bias = torch.zeros(6, dtype=torch.float64, requires_grad=True)
        options = {"gate_BLE": gate, "initial_state": state, "delta_bias_E": bias, "delta_softplus": softplus}
        with use_backend(implementation):
            y, last = selective_scan(first, steps, a, maps, reads, d, mask=mask, **options, return_state=True)
            assert not y[~mask].any()
            leaves += [a, d, bias]
            found.append([y, last, *torch.autograd.grad(y.square().sum() + last.square().sum(), leaves)])
    torch.testing.assert_close(*found)


def test_steps_equal_the_scan() -> None:
    x, delta, a, b, c, d, state = (t.detach() for t in draw((2, 12, 6, 4), torch.float64))
    whole, last = selective_scan(x, delta, a, b, c, d, initial_state=state, return_state=True)
    for t in range(12):
        y, state = selective_step(x[:, t], delta[:, t], a, b[:, t], c[:, t], d, state)
        torch.testing.assert_close(y, whole[:, t])
    torch.testing.assert_close(state, last)


def test_the_number_of_threads_changes_rounding_alone() -> None:
    inputs = draw((1, 100, 70, 16), torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            y = selective_scan(*inputs[:6])
            results.append((y, *gradients((y,), inputs[:5])))
    finally:
        torch.set_num_threads(before)
    assert_all_close(*results, FLOAT32)


def test_shapes_that_do_not_fit_are_refused_in_one_line() -> None:
    x, delta, a, b, c, _, _ = draw((2, 5, 3, 4), torch.float32)
    with pytest.raises(EspalierError, match=r"give \(B, L, E\)"):
        selective_scan(x, delta[:, :4], a, b, c)
    with pytest.raises(EspalierError, match=r"give both as \(B, L, N\)"):
        selective_scan(x, delta, a, b[..., :2], c)
    with pytest.raises(EspalierError, match=r"a is \(3, 0\): give at least one state"):
        selective_scan(x, delta, a[:, :0], b[..., :0], c[..., :0])
    with pytest.raises(EspalierError, match=r"gate is \(2, 5, 2\): give it the shape of x, \(2, 5, 3\)"):
        selective_scan(x, delta, a, b, c, gate_BLE=x[..., :2])
    with pytest.raises(EspalierError, match=r"delta_bias is \(2,\): give it the shape \(3,\)"):
        selective_scan(x, delta, a, b, c, delta_bias_E=torch.zeros(2), delta_softplus=True)
    with pytest.raises(EspalierError, match="x is empty"):
        selective_scan(x[:0], delta[:0], a, b[:0], c[:0])
    with pytest.raises(EspalierError, match=r"initial_state is \(2, 4, 3\): give it the shape \(2, 3, 4\)"):
        selective_scan(x, delta, a, b, c, initial_state=torch.zeros(2, 4, 3))
    with pytest.raises(EspalierError, match=r"mask is a list: give a tensor of the shape \(2, 5\)"):
        selective_scan(x, delta, a, b, c, mask=[[1] * 5] * 2)


def test_a_step_refuses_what_would_be_broadcast() -> None:
    x, delta, a, b, c, d, state = draw((2, 5, 3, 4), torch.float32)
    token = {"x_BE": x[:, 0], "delta_BE": delta[:, 0], "a_EN": a, "b_BN": b[:, 0], "c_BN": c[:, 0], "d_E": d}
    token["state_BEN"] = state
    for name, wrong, words in [
        ("state_BEN", state[:1], r"state is \(1, 3, 4\): give it the shape \(2, 3, 4\)"),
        ("state_BEN", state[:, :1], r"state is \(2, 1, 4\): give it the shape \(2, 3, 4\)"),
        ("d_E", d[:1], r"d is \(1,\): give it the shape \(3,\)"),
        ("x_BE", x, r"give \(B, E\), \(B, E\), \(E, N\)"),
        ("delta_BE", delta[:1, 0], r"give \(B, E\), \(B, E\), \(E, N\)"),
        ("b_BN", b[:1, 0], r"give both as \(B, N\) = \(2, 4\)"),
    ]:
        with pytest.raises(EspalierError, match=words):
            selective_step(**{**token, name: wrong})


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(deadline=None, max_examples=15)
@given(
    batch=st.integers(1, 3), length=st.integers(1, 150), channels=st.integers(1, 80), taps=st.integers(1, 5),
    bias=st.booleans(),
)  # fmt: skip
def test_convolution_equals_conv1d(
    implementation: str, batch: int, length: int, channels: int, taps: int, bias: bool
) -> None:
    g = torch.Generator().manual_seed(length)
    wide = torch.randn(batch, length, channels + 7, dtype=torch.float64, generator=g).requires_grad_()
    weight = torch.randn(channels, taps, dtype=torch.float64, generator=g).requires_grad_()
    offset = torch.randn(channels, dtype=torch.float64, generator=g).requires_grad_() if bias else None
    x = wide[..., 3 : 3 + channels]
    padded = F.pad(x.mT, (taps - 1, 0))
    theirs = F.silu(F.conv1d(padded, weight[:, None], offset, groups=channels)).mT
    with use_backend(implementation):
        ours = causal_conv_silu(x, weight, offset)
    inputs = (wide, weight) if offset is None else (wide, weight, offset)
    assert_all_close((ours,), (theirs,), 1e-10)
    assert_all_close(gradients((ours,), inputs), gradients((theirs,), inputs), 1e-10)


@KERNELS
def test_compiled_operators_pass_torchs_own_checks() -> None:
    from espalier.nn.kernels import cpu

    x, delta, a, b, c, d, state = draw((2, 9, 5, 3), torch.float64)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for gate, bias in ((None, None), (x.detach().clone().requires_grad_(), d.detach().clone().requires_grad_())):
        inputs = (x, delta, bias, a, b, c, d, gate, state, bias is not None, True)
        torch.library.opcheck(cpu.selective_scan_cpu, inputs, test_utils=checks)
    torch.library.opcheck(cpu.causal_conv_silu_cpu, (x, a[:, :2], d), test_utils=checks)
