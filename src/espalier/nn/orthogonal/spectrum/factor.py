"""Solve with many right-hand sides: by the blocks of a factorisation where kernels are compiled, else by inverses."""

from __future__ import annotations

from typing import NamedTuple

from espalier.nn.kernels import split_complex as kernels
from espalier.nn.orthogonal.spectrum.split_complex import (
    SplitComplex,
    beside,
    block,
    each,
    invert,
    many,
    product,
    transpose,
)

# Rows of a block: an inverse costs three times a factorisation, and a block must be large enough for fast products.
_WIDTH = 64


class Factor(NamedTuple):
    """A factorisation of matrices (N, n, n) by blocks of ``width`` rows: their inverses if ``width`` is n."""

    planes: SplitComplex
    width: int


def inverse(n: SplitComplex) -> Factor:
    """Return the inverses of matrices whose Hermitian part is at least I, as a factorisation of one block."""
    return Factor(invert(n), n[0].shape[-1])


def factor_(n: SplitComplex) -> Factor:
    """Factor matrices whose Hermitian part is at least I, in place where the compiled kernels do it.

    Args:
        n: contiguous parts (N, n, n), which may be overwritten.
    """
    if len(n) == 1 or not many(len(n[0])) or not kernels.compiled(*n):
        return inverse(n)
    width = min(_WIDTH, n[0].shape[-1])
    return Factor(kernels.factor_(n, width), width)


def solve(
    x: SplitComplex,
    factored: Factor,
    less: SplitComplex,
    v: SplitComplex = (),
    *,
    transposed: bool = False,
    conj: bool = False,
) -> tuple[SplitComplex, SplitComplex]:
    """Return z = x·N⁻¹, with N first transposed and conjugated as asked, and y = [2z − less, −2z·Vᵀ].

    Args:
        x: rows, split-complex (N, B, n); left untouched.
        factored: what was made of N.
        less: (N, B, n); y is () without it.
        v: (N, m, n), conjugated as N is; without it y ends after the first n columns.
        transposed: use Nᵀ.
        conj: use the conjugates of N and V.
    """
    factor, width = factored
    n = factor[0].shape[-1]
    extra = v[0].shape[1] if v else 0
    if len(x) == 2 and (width < n or kernels.compiled(*x, *factor, *less)):
        z, y = kernels.solve(x, factor, width, less or None, transposed=transposed, conj=conj, extra=extra)
        if y and v:
            product(z, transpose(v), conj_b=conj, into=block(y, slice(None), slice(n, None)), alpha=-2, add=False)
        return z, y or ()
    z = product(x, transpose(factor) if transposed else factor, conj_b=conj)
    y = each(lambda plane, minus: 2 * plane - minus, z, less) if less else ()
    return z, beside(y, product(z, transpose(v), conj_b=conj, alpha=-2)) if y and v else y
