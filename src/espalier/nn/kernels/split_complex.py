"""The compiled kernels of the orthogonal layers: split-complex products and inverses, transforms of images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from espalier.nn.kernels.arguments import DFT_FORWARD, DFT_INVERSE, PLANES_FACTOR, PLANES_PRODUCT, PLANES_SOLVE
from espalier.nn.kernels.backend import choose
from espalier.nn.kernels.library import call, fresh, same_bits, usable
from espalier.nn.precision import differentiable

SplitComplex = tuple[Tensor, ...]
"""The real and the imaginary parts; of real numbers the real part alone."""

_ROWS = 6  # of a tile of odd transforms, as in dft.cpp


def compiled(*tensors: Tensor) -> bool:
    """Return whether the kernels can run on these tensors: no graph of any kind is being recorded through them."""
    if differentiable(*tensors):
        return False
    return usable(*tensors) and choose("orthogonal", "cpu") == "compiled"


def same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors hold the same numbers; a NaN is one where the kernels run, in a sixth of the time."""
    one, other = one.detach(), other.detach()  # hold the memory, should another thread give a parameter a new one
    if one.device != other.device or one.dtype != other.dtype or one.shape != other.shape:
        return False
    if one.is_contiguous() and other.is_contiguous() and compiled(one, other):
        return same_bits(one, other)
    return torch.equal(one, other)


def product(
    a: SplitComplex, b: SplitComplex, into: SplitComplex | None, *, conj_a: bool, conj_b: bool, alpha: int, add: bool
) -> SplitComplex:
    """Return alpha·a·b, added to ``into`` or (without ``add``) in its place; a (N, p, q), b (N, q, r) may be any views.

    The planes of one matrix have the same strides, and the columns of ``into`` lie one apart.
    """
    (count, m, k), n = a[0].shape, b[0].shape[2]
    c = into or (fresh(a[0], count, m, n), fresh(a[0], count, m, n))
    values = _fields("a", a, ("batch", "row", "column")) | _fields("b", b, ("batch", "row", "column"))
    values |= _fields("c", c, ("batch", "row")) | {"count": count, "m": m, "k": k, "n": n}
    flags = {"conj_a": conj_a, "conj_b": conj_b, "add": add and into is not None, "alpha": alpha}
    call(PLANES_PRODUCT, a[0].dtype, **values, **flags)
    return c


def _fields(name: str, parts: SplitComplex | None, axes: Sequence[str]) -> dict[str, Any]:
    """Return what a structure holds of matrices (N, p, q): both planes, and the steps along its first axes."""
    real, imag = parts or (None, None)
    steps = real.stride() if real is not None else (0, 0)
    return {f"{name}_re": real, f"{name}_im": imag} | {
        f"{name}_{axis}": step for axis, step in zip(axes, steps, strict=False)
    }


def factor_(a: SplitComplex, width: int) -> SplitComplex:
    """Factor contiguous parts (N, n, n) in place by blocks of ``width`` rows, as ``solve`` takes them.

    N = L·U: below the block diagonal stands L (unit diagonal blocks), above it U, on it the *inverses* of U's diagonal
    blocks. With one block that is the inverse.
    """
    count, n, _ = a[0].shape
    batch, row, _ = a[0].stride()
    call(PLANES_FACTOR, a[0].dtype, re=a[0], im=a[1], count=count, n=n, batch=batch, row=row, width=width)
    return a


def solve(
    x: SplitComplex,
    factor: SplitComplex,
    width: int,
    less: SplitComplex | None,
    *,
    transposed: bool,
    conj: bool,
    extra: int = 0,
) -> tuple[SplitComplex, SplitComplex | None]:
    """Return z = x·N⁻¹ for rows x (N, B, n), and y = 2z − less with room for ``extra`` columns, None without ``less``.

    Args:
        x: the right-hand sides.
        factor: what ``factor_`` made of N with this ``width``, of Nᵀ if ``transposed``, of its conjugate if ``conj``.
        width: rows of a block.
        less: (N, B, n).
        transposed, conj: see ``factor``.
        extra: columns of y that are left as they are.
    """
    count, rows, n = x[0].shape
    z = fresh(x[0], count, rows, n), fresh(x[0], count, rows, n)
    y = less and (fresh(x[0], count, rows, n + extra), fresh(x[0], count, rows, n + extra))
    values: dict[str, Any] = {}
    pairs = {"f": factor, "x": _rows(x), "less": less and _rows(less), "z": z, "y": y}
    for name, pair in pairs.items():
        values |= _fields(name, pair, ("batch", "row"))
    sizes = {"count": count, "rows": rows, "n": n, "width": width}
    call(PLANES_SOLVE, z[0].dtype, **values, **sizes, transposed=transposed, conj=conj)
    return z, y


def _rows(pair: SplitComplex) -> SplitComplex:
    """Return planes with the same strides whose columns lie one apart."""
    real, imag = (plane.resolve_neg() for plane in pair)
    if real.stride() == imag.stride() and real.stride(-1) == 1:
        return real, imag
    return real.contiguous(), imag.contiguous()


def packed_matrix(matrix: Tensor) -> Tensor:
    """Return a matrix as the transforms read it: (rows/6, columns, 6) numbers, with rows of zeros past the end."""
    padded = torch.nn.functional.pad(matrix, (0, 0, 0, -len(matrix) % _ROWS))
    return padded.reshape(-1, _ROWS, matrix.shape[1]).mT.reshape(-1)


def columns_first(x: Tensor) -> bool:
    """Return whether x (*S, N) is a view of contiguous (N, *S)."""
    return not x.is_contiguous() and x.movedim(-1, 0).is_contiguous()


def together(channels: int) -> int:
    """Return in what powers of two columns from one example come: the transforms take two vectors of them as one."""
    return math.gcd(channels, 64)


def _sizes(size: Sequence[int], columns: int, first: bool, together: int) -> dict[str, int]:
    """Return the sizes by the kernels' names; ``first`` where images lie in memory as (N, *S)."""
    *lead, width = size
    size_0, size_1 = *lead, *[0] * (2 - len(lead))
    sizes = {"lead": len(lead), "width": width, "rows": math.prod(lead), "size_0": size_0, "size_1": size_1}
    return sizes | {"columns": columns, "columns_first": first, "together": together}


def rfft(x: Tensor, tables: Tensor, frequencies: int, *, together: int) -> SplitComplex:
    """Return the planes (F, N) of the transform of x (*S, N) with packed tables that keep F ``frequencies``."""
    *size, columns = x.shape
    first = columns_first(x)
    x = x if first else x.contiguous()
    real, imag = fresh(x, frequencies, columns), fresh(x, frequencies, columns)
    sizes = _sizes(size, columns, first, together)
    call(DFT_FORWARD, x.dtype, x=x, tables=tables, re=real, im=imag, channels=1, **sizes)
    return real, imag


def irfft(
    spectrum: SplitComplex, tables: Tensor, size: Sequence[int], bias: Tensor | None, *, first: bool, together: int
) -> Tensor:
    """Return images (*S, N), laid out as (N, *S) if ``first``, from planes (F, N); the bias is added."""
    real, imag = (plane.contiguous() for plane in spectrum)
    columns = real.shape[1]
    x = fresh(real, columns, *size).movedim(0, -1) if first else fresh(real, *size, columns)
    sizes = _sizes(size, columns, first, together) | {"channels": 1 if bias is None else len(bias)}
    call(DFT_INVERSE, real.dtype, re=real, im=imag, tables=tables, bias=bias, x=x, **sizes)
    return x
