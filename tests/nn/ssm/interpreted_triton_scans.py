"""The Triton kernels on a CPU, in Triton's interpreter, against plain loops in float64; see ``test_triton_scans``."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from espalier.nn import selective_scan, ssd
from espalier.nn.kernels import triton_scans
from reference.selective_scan_reference import selective_scan_loop
from reference.ssd_reference import ssd_loop

UNSHRUNK = (Phase.explicit, Phase.generate)  # the interpreter takes seconds an example

scan_module = importlib.import_module("espalier.nn.ssm.selective_scan")
ssd_module = importlib.import_module("espalier.nn.ssm.ssd")


@pytest.fixture(autouse=True, scope="module")
def in_triton() -> Iterator[None]:
    """Let both recurrences take Triton's way with the CPU tensors of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (scan_module, ssd_module):
            patch.setattr(module, "choose", lambda operation, kind: "triton")
        yield


class Draw:
    """Float64 tensors from a seed, each with its float32 twin; some twins are views with gaps."""

    def __init__(self, seed: int, *, strided: bool) -> None:
        self.generator, self.strided = torch.Generator().manual_seed(seed), strided
        self.exact: list[Tensor] = []
        self.single: list[Tensor] = []

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=self.generator)

    def add(self, value: Tensor) -> None:
        # What float32 cannot hold would be an error of the comparison alone.
        single = value.float()
        self.exact.append(single.double().requires_grad_())
        if self.strided:
            single = torch.nn.functional.pad(single.mT, (2, 1))[..., 2:-1].mT if single.ndim > 1 else single
        self.single.append(single.requires_grad_())


def assert_same(ours: tuple[Tensor, ...], exact: tuple[Tensor, ...], inputs: Draw, tolerance: float) -> None:
    """Compare outputs, and the gradients of a random sum of them with respect to all inputs."""
    weights = [inputs.normal(*output.shape) for output in exact]
    mine = torch.autograd.grad(ours, inputs.single, [w.to(o.dtype) for w, o in zip(weights, ours, strict=True)])
    theirs = torch.autograd.grad(exact, inputs.exact, weights)
    for place, (one, two) in enumerate(zip((*ours, *mine), (*exact, *theirs), strict=True)):
        assert one.shape == two.shape
        assert (one - two).abs().max().item() <= tolerance * max(1.0, two.abs().max().item()), f"tensor {place}"


def draw_scan(shape: tuple[int, int, int, int], *, initial: bool, strided: bool) -> Draw:
    batch, length, channels, size = shape
    inputs = Draw(sum(shape), strided=strided)
    steps = torch.rand(batch, length, channels, dtype=torch.float64, generator=inputs.generator)
    rates = -2 * torch.rand(channels, size, dtype=torch.float64, generator=inputs.generator)
    maps = inputs.normal(batch, length, size), inputs.normal(batch, length, size)
    state = (inputs.normal(batch, channels, size),) if initial else ()
    for value in (inputs.normal(batch, length, channels), steps, rates, *maps, inputs.normal(channels), *state):
        inputs.add(value)
    return inputs


@settings(deadline=None, max_examples=8, phases=UNSHRUNK)
@given(
    batch=st.integers(1, 2), length=st.integers(1, 40), channels=st.integers(1, 20), size=st.integers(1, 9),
    initial=st.booleans(), strided=st.booleans(), wide=st.booleans(),
)  # fmt: skip
def test_selective_scan(
    batch: int, length: int, channels: int, size: int, initial: bool, strided: bool, wide: bool
) -> None:
    inputs = draw_scan((batch, length, channels, size), initial=initial, strided=strided)
    mask = torch.rand(batch, length, generator=inputs.generator) > 0.2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_scans, "_MANY_PROGRAMS", 0 if wide else 1 << 12)  # 16 channels a program, or 8
        tensors, state = inputs.single[:6], inputs.single[6] if initial else None
        ours = selective_scan(*tensors, initial_state=state, mask=mask, return_state=True)
        exact = selective_scan_loop(*inputs.exact, mask_BL=mask)  # type: ignore[arg-type]
        assert_same(ours, exact, inputs, 2e-5)  # type: ignore[arg-type]


def test_selective_scan_saves_nothing_without_gradients_and_keeps_float64_exact() -> None:
    inputs = draw_scan((1, 9, 3, 4), initial=True, strided=False)
    exact = selective_scan_loop(*inputs.exact)  # type: ignore[arg-type]
    with torch.no_grad():
        y = selective_scan(*inputs.single[:6], initial_state=inputs.single[6])
    torch.testing.assert_close(y.double(), exact[0], rtol=1e-5, atol=1e-5)
    double = selective_scan(*inputs.exact[:6], initial_state=inputs.exact[6])
    torch.testing.assert_close(double, exact[0], rtol=0, atol=1e-12)


def test_strong_and_growing_exponents() -> None:
    # Decays from e^-60 a step to growth by e^3.
    a = torch.tensor([[-60.0, -20.0, -1e-3, 3.0]])
    x, delta, maps = torch.ones(1, 8, 1), torch.ones(1, 8, 1), torch.ones(1, 8, 4)
    found = selective_scan(x, delta, a, maps, maps, return_state=True)
    exact = selective_scan_loop(*(t.double() for t in (x, delta, a, maps, maps)))
    for one, two in zip(found, exact, strict=True):
        torch.testing.assert_close(one.double(), two, rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=10, phases=UNSHRUNK)
@given(
    batch=st.integers(1, 2), length=st.integers(1, 40), shape=st.sampled_from([(1, 3, 5, 7), (2, 2, 3, 4)]),
    chunk=st.integers(1, 8), initial=st.booleans(), together=st.sampled_from([1, 3, 1 << 20]), keep=st.booleans(),
    final=st.booleans(),
)  # fmt: skip
def test_ssd(
    batch: int, length: int, shape: tuple[int, ...], chunk: int, initial: bool, together: int, keep: bool, final: bool
) -> None:
    groups, share, size, width = shape
    heads = groups * share
    inputs = Draw(length, strided=False)
    steps = torch.rand(batch, length, heads, dtype=torch.float64, generator=inputs.generator)
    rates = -2 * torch.rand(heads, dtype=torch.float64, generator=inputs.generator)
    maps = inputs.normal(batch, length, groups, size), inputs.normal(batch, length, groups, size)
    state = (inputs.normal(batch, heads, size, width),) if initial else ()
    for value in (inputs.normal(batch, length, heads, width), steps, rates, *maps, inputs.normal(heads), *state):
        inputs.add(value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssd_module, "_SEGMENT_NUMBERS", {"cpu": together * batch * share * chunk * chunk})
        patch.setattr(ssd_module, "_KEPT_NUMBERS", 1 << 40 if keep else 0)
        for twins, tolerance in ((inputs.single, 1e-4), (inputs.exact, 1e-10)):
            start = twins[6] if initial else None
            ours = ssd(*twins[:6], initial_state=start, return_state=True, chunk_size=chunk)
            exact = ssd_loop(*inputs.exact)  # type: ignore[arg-type]
            several = 2 if final else 1
            given_twins = Draw(length, strided=False)
            given_twins.exact, given_twins.single = inputs.exact, twins
            assert_same(ours[:several], exact[:several], given_twins, tolerance)
