"""The Cayley transform of matrices against the original's formula: orthogonal, exact, never hanging."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from espalier.errors import EspalierError
from espalier.nn import cayley
from reference.cayley_original import original_cayley


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def defect(q: Tensor) -> float:
    """Return how far the shorter side of Q is from orthonormal."""
    gram = q.mH @ q if q.shape[-2] >= q.shape[-1] else q @ q.mH
    return (gram - torch.eye(gram.shape[-1], dtype=q.dtype)).abs().max().item()


@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 20), columns=st.integers(1, 20), batch=st.sampled_from([(), (3,), (2, 2)]),
    dtype=st.sampled_from([torch.float64, torch.complex128]),
)  # fmt: skip
def test_equals_the_formula_with_its_gradient(
    rows: int, columns: int, batch: tuple[int, ...], dtype: torch.dtype
) -> None:
    w = draw(*batch, rows, columns, dtype=dtype, seed=rows + 31 * columns).requires_grad_()
    cotangent = draw(*batch, rows, columns, dtype=dtype, seed=1)
    ours, theirs = cayley(w), original_cayley(w.reshape(-1, rows, columns)).reshape(w.shape)
    assert (ours - theirs).abs().max() < 1e-10
    assert defect(ours.detach()) < 1e-12
    (mine,), (other,) = (torch.autograd.grad(q, w, cotangent) for q in (ours, theirs))
    assert (mine - other).abs().max() < 1e-10 * max(1.0, other.abs().max().item())


@pytest.mark.parametrize(("rows", "columns"), [(70, 70), (130, 90), (90, 130)])
def test_larger_matrices_have_the_same_gradient(rows: int, columns: int) -> None:
    w = (draw(2, rows, columns, dtype=torch.complex128) / rows**0.5).requires_grad_()
    (mine,), (other,) = (torch.autograd.grad(q.abs().sum(), w) for q in (cayley(w), original_cayley(w)))
    assert (mine - other).abs().max() < 1e-10


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e2, 1e4])
@pytest.mark.parametrize(("rows", "dtype"), [(40, torch.complex64), (40, torch.complex128), (60, torch.float32)])
def test_orthogonality_error_is_a_few_roundings_of_a(scale: float, rows: int, dtype: torch.dtype) -> None:
    w = scale * draw(rows, 40, dtype=dtype)
    u, v = w[:40].to(torch.complex128), w[40:].to(torch.complex128)
    norm = torch.linalg.matrix_norm(u - u.mH + v.mH @ v, 2).item()
    ours = defect(cayley(w).to(torch.complex128))
    assert ours < 30 * torch.finfo(dtype).eps * (1 + norm)
    if norm > 100 and rows == 40:
        assert ours < defect(original_cayley(w[None])[0].to(torch.complex128))


def test_half_precision_and_autocast_compute_in_float32() -> None:
    w = draw(12, 12).bfloat16()
    assert torch.equal(cayley(w), cayley(w.float()).bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = cayley(w.float())
    assert defect(inside) < 2e-6


def test_no_size_hangs_with_two_threads() -> None:
    # LAPACK's batched routines hang above ~144 with two threads; a hang would take this process down too.
    code = (
        "import torch; from espalier.nn import cayley; torch.set_num_threads(2)\n"
        "for n in (128, 145, 192, 256, 520):\n"
        "    dtype = torch.complex64 if n < 200 else torch.float32\n"
        "    w = (torch.randn(2, n, n, dtype=dtype) / n**0.5).requires_grad_()\n"
        "    q = cayley(w); q.abs().sum().backward()\n"
        "    print(n, (q.mH @ q - torch.eye(n)).abs().max().item() < 1e-5, flush=True)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True)
    assert run.stdout.split()[1::2] == ["True"] * 5


@pytest.mark.parametrize("matrix", [torch.ones(3), torch.ones(0, 3), torch.ones(2, 2, dtype=torch.int64)])
def test_refuses_what_has_no_transform(matrix: Tensor) -> None:
    with pytest.raises(EspalierError, match="no Cayley transform"):
        cayley(matrix)
