"""The compiled kernels of the orthogonal layers against complex torch, on any views, sizes and layouts."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from espalier.nn import use_backend
from espalier.nn.kernels import split_complex as kernels
from espalier.nn.orthogonal.shuffle import space_to_depth
from espalier.nn.orthogonal.spectrum.dft import irfft, rfft, tables
from espalier.nn.orthogonal.spectrum.split_complex import product
from needs import KERNELS

pytestmark = KERNELS
LONG_AXES = [[16], [64], [16, 32], [3, 48], [32, 2, 5]]  # of registers' size, and those that are halved in memory
DTYPES = [(torch.float32, torch.complex64, 2e-4), (torch.float64, torch.complex128, 1e-11)]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def matrices(
    count: int, rows: int, columns: int, transposed: bool, seed: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    shape = (count, columns + 2, rows + 3) if transposed else (count, rows + 2, columns + 3)
    real, imag = (draw(*shape, seed=seed + part, dtype=dtype) for part in range(2))
    if transposed:
        real, imag = real.mT, imag.mT
    return real[:, 1 : rows + 1, 2 : columns + 2], imag[:, 1 : rows + 1, 2 : columns + 2]


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.tuples(*[st.integers(1, 20)] * 3), deep=st.booleans(), flags=st.tuples(*[st.booleans()] * 5),
    alpha=st.sampled_from([1, -1, -2]), kind=st.sampled_from(DTYPES),
)  # fmt: skip
def test_products_of_views(
    sizes: tuple[int, int, int],
    deep: bool,
    flags: tuple[bool, ...],
    alpha: int,
    kind: tuple[torch.dtype, torch.dtype, float],
) -> None:
    (m, k, n), (trans_a, trans_b, conj_a, conj_b, add) = sizes, flags
    m, k = (m + 61, k + 300) if deep else (m, k)  # past one packed group of rows, past one pass over k
    dtype, _, tolerance = kind
    a, b = matrices(2, m, k, trans_a, 1, dtype), matrices(2, k, n, trans_b, 3, dtype)
    into = matrices(2, m, n, False, 5, dtype) if add else None
    left, right = torch.complex(*a), torch.complex(*b)
    expected = alpha * (left.conj() if conj_a else left) @ (right.conj() if conj_b else right)
    expected = expected + torch.complex(*into) if into else expected
    real, imag = product(a, b, conj_a=conj_a, conj_b=conj_b, into=into, alpha=alpha)
    assert imag is not None
    assert into is None or real is into[0]
    assert (torch.complex(real, imag) - expected).abs().max() < tolerance * math.sqrt(k)


@pytest.mark.parametrize("n", [1, 5, 16, 17, 40, 70])
@pytest.mark.parametrize("kind", DTYPES)
def test_inverses(n: int, kind: tuple[torch.dtype, torch.dtype, float]) -> None:
    dtype, complex_dtype, tolerance = kind
    w = torch.complex(draw(3, n, n, dtype=dtype), draw(3, n, n, seed=1, dtype=dtype))
    a = torch.eye(n, dtype=complex_dtype) + w - w.mH
    real, imag = kernels.factor_((a.real.contiguous(), a.imag.contiguous()), n)
    assert (torch.complex(real, imag) @ a - torch.eye(n)).abs().max() < tolerance


@settings(deadline=None, max_examples=40)
@given(
    size=st.lists(st.integers(1, 13), min_size=1, max_size=3) | st.sampled_from(LONG_AXES),
    columns=st.integers(1, 150), channels=st.sampled_from([1, 48, 64]), first=st.booleans(),
    kind=st.sampled_from(DTYPES),
)  # fmt: skip
def test_transforms_are_those_of_an_fft_at_one_of_each_pair_and_their_transposes(
    size: list[int], columns: int, channels: int, first: bool, kind: tuple[torch.dtype, torch.dtype, float]
) -> None:
    dtype, _, tolerance = kind
    axes = tuple(range(len(size)))
    x = draw(columns, *size, dtype=dtype).movedim(0, -1) if first else draw(*size, columns, dtype=dtype)
    forward, inverse = (tables(size, dtype, x.device, inverse=inverse, channels=channels) for inverse in (False, True))
    bias = draw(1, dtype=dtype)
    full = torch.fft.rfftn(x, dim=axes).reshape(-1, columns)[one_of_each_pair(size)]
    for name in ("compiled", "torch"):
        with use_backend(name):
            spectrum = rfft(x, forward)
            assert (torch.complex(*spectrum) - full).abs().max() < tolerance
            for layout in (False, True):
                again = irfft(spectrum, inverse, bias, columns_first=layout)
                assert (again - x - bias).abs().max() < tolerance
                if name == "compiled":
                    assert (again.movedim(-1, 0) if layout else again).is_contiguous()
            weights = draw(*spectrum[0].shape, seed=2, dtype=dtype), draw(*spectrum[0].shape, seed=3, dtype=dtype)
            for matrices in (forward, inverse):
                there = sum((s * w).sum() for s, w in zip(rfft(x, matrices), weights, strict=True))
                adjoint = irfft(weights, matrices)
                assert abs(there - (adjoint * x).sum()) < 10 * tolerance * math.sqrt(x.numel())


def one_of_each_pair(size: list[int]) -> list[int]:
    """Return where the half spectrum holds frequencies whose mirror image it has not held before."""
    half = list(itertools.product(*map(range, size[:-1]), range(size[-1] // 2 + 1)))
    first, seen = [], set()
    for place, frequency in enumerate(half):
        if tuple(-f % n for f, n in zip(frequency, size, strict=True)) not in seen:
            first.append(place)
        seen.add(frequency)
    return first


@settings(deadline=None, max_examples=40)
@given(
    count=st.integers(1, 3), batch=st.integers(0, 9), n=st.integers(1, 40), width=st.integers(1, 48),
    flags=st.tuples(*[st.booleans()] * 3), kind=st.sampled_from(DTYPES),
)  # fmt: skip
def test_solutions_by_blocks_are_those_of_the_matrices(
    count: int,
    batch: int,
    n: int,
    width: int,
    flags: tuple[bool, bool, bool],
    kind: tuple[torch.dtype, torch.dtype, float],
) -> None:
    (transposed, conj, views), (dtype, complex_dtype, tolerance) = flags, kind
    w = torch.complex(*matrices(count, n, n, False, 1, dtype))
    a = torch.eye(n, dtype=complex_dtype) + (w - w.mH) / n**0.5
    # A single number is contiguous as it lies: ``contiguous`` would hand out the matrix itself, to be overwritten.
    copied = functools.partial(torch.clone, memory_format=torch.contiguous_format)
    factor = kernels.factor_((copied(a.real), copied(a.imag)), width)
    x, less = matrices(count, batch, n, views, 3, dtype), matrices(count, batch, n, views, 5, dtype)
    z, y = kernels.solve(x, factor, width, less, transposed=transposed, conj=conj, extra=2)
    of = a.mT if transposed else a
    expected = torch.linalg.solve(of.conj() if conj else of, torch.complex(*x), left=False)
    assert y is not None
    if batch:
        assert (torch.complex(*z) - expected).abs().max() < tolerance * n**0.5
        reflected = 2 * expected - torch.complex(*less)
        assert (torch.complex(*y)[..., :n] - reflected).abs().max() < 2 * tolerance * n**0.5
    assert y[0].shape == (count, batch, n + 2)
    assert kernels.solve(x, factor, width, None, transposed=transposed, conj=conj)[1] is None


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(2, 4),
    st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_blocks_of_pixels_become_channels_as_in_torch(
    batch: int, channels: int, height: int, width: int, stride: int, dtype: torch.dtype
) -> None:
    x = torch.randn(batch, channels, height * stride, width * stride, dtype=dtype, requires_grad=True)
    blocks = space_to_depth(x, (stride, stride))
    assert torch.equal(blocks, F.pixel_unshuffle(x, stride))  # nothing is computed, numbers only move
    grad = torch.randn_like(blocks).mT.contiguous().mT  # in another layout
    assert torch.equal(torch.autograd.grad(blocks, x, grad)[0], F.pixel_shuffle(grad, stride))


def test_blocks_of_pixels_are_differentiable_twice() -> None:
    x = torch.randn(1, 2, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda images: space_to_depth(images, (2, 2)).square(), x)
