"""The Cayley transform of matrices: an orthogonal, semi-orthogonal or unitary matrix for any matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from espalier.errors import EspalierError
from espalier.nn.orthogonal.spectrum.dft import Angles
from espalier.nn.orthogonal.spectrum.operator import apply_cayley
from espalier.nn.precision import outside_graphs


def cayley(matrix: Tensor) -> Tensor:
    """Return the Cayley transform ``Q = [2N⁻¹ − I; −2VN⁻¹]``, ``N = I + U − Uᴴ + VᴴV``, of ``W = [U; V]``.

    U is the top square block and V the rest. N has Hermitian part ⪰ I, so the transform exists for every W, and
    ``QᴴQ = I``. Wide matrices go through the transpose and get orthonormal rows. ``2N⁻¹ − I`` is the paper's
    ``(I + A)⁻¹(I − A)`` with less rounding. Matrices of any size are safe with any number of threads (see Note
    [LAPACK hang]); half-precision ones are computed in float32.

    Args:
        matrix: (..., rows, columns), real or complex.

    Returns:
        Q, of the shape and dtype of the matrix; differentiable any number of times.

    Raises:
        EspalierError: fewer than two dimensions, an empty matrix, or integers.

    Source: arXiv 2104.07167, section 4.
    """
    if matrix.ndim < 2 or 0 in matrix.shape[-2:]:
        raise EspalierError(f"matrix of shape {tuple(matrix.shape)} has no Cayley transform: give (..., rows, columns)")
    if not (matrix.is_floating_point() or matrix.is_complex()):
        raise EspalierError(f"matrix of {matrix.dtype} has no Cayley transform: convert it to floating point")
    return _transform(matrix).to(matrix.dtype)


@outside_graphs
def _transform(matrix: Tensor) -> Tensor:
    *batch, rows, columns = matrix.shape
    tall = matrix.reshape(-1, rows, columns)
    tall = tall.mT if rows < columns else tall
    if matrix.is_complex():
        # Two taps, the first turned by nothing, the second by a quarter.
        taps = torch.stack((tall.real, tall.imag))
        angles = Angles(taps.new_tensor([[1.0, 0.0]]), taps.new_tensor([[0.0, 1.0]]))
        transposed = torch.complex(*apply_cayley((), taps, angles, wide=False))
    else:
        taps = tall[None].to(torch.promote_types(matrix.dtype, torch.float32))
        transposed = apply_cayley((), taps, None, wide=False)[0]
    return (transposed if rows < columns else transposed.mT).reshape(*batch, rows, columns)


def apply_cayley_matrix(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x·cayley(weight)ᵀ`` without forming the matrix: two products with V for every step instead of five.

    Args:
        x: (..., columns), of the weight's dtype.
        weight: (rows, columns), real, float32 or float64.

    Returns:
        (..., rows); differentiable any number of times.
    """
    rows, columns = weight.shape
    wide = rows < columns
    tall = weight.mT if wide else weight
    y = apply_cayley((x.reshape(1, -1, columns),), tall[None, None], None, wide=wide)[0]
    return y.view(*x.shape[:-1], rows)
