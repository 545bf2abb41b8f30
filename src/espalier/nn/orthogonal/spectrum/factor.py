"""Solve with many right-hand sides: by the blocks of a factorisation where kernels are compiled, else by inverses."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from espalier.nn.kernels import split_complex as kernels
from espalier.nn.orthogonal.spectrum.split_complex import SplitComplex, block, invert, many, product, transpose

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
    real, imag = n
    if imag is None or not many(len(real)) or not kernels.compiled(real, imag):
        return inverse(n)
    width = min(_WIDTH, real.shape[-1])
    return Factor(kernels.factor_((real, imag), width), width)


def solve(
    x: SplitComplex,
    factored: Factor,
    less: SplitComplex | None,
    v: SplitComplex | None = None,
    *,
    transposed: bool = False,
    conj: bool = False,
) -> tuple[SplitComplex, SplitComplex | None]:
    """Return z = x·N⁻¹, with N first transposed and conjugated as asked, and y = [2z − less, −2z·Vᵀ].

    Args:
        x: rows, split-complex (N, B, n); left untouched.
        factored: what was made of N.
        less: (N, B, n); y is None without it.
        v: (N, m, n), conjugated as N is; without it y ends after the first n columns.
        transposed: use Nᵀ.
        conj: use the conjugates of N and V.
    """
    factor, width = factored
    n = factor[0].shape[-1]
    extra = 0 if v is None else v[0].shape[1]
    pairs = _complex(x), _complex(factor), _complex(less)
    if pairs[0] and pairs[1] and (width < n or kernels.compiled(*pairs[0], *pairs[1], *(pairs[2] or ()))):
        z, y = kernels.solve(pairs[0], pairs[1], width, pairs[2], transposed=transposed, conj=conj, extra=extra)
        if y is not None and v is not None:
            product(z, transpose(v), conj_b=conj, into=block(y, slice(None), slice(n, None)), alpha=-2, add=False)
        return z, y
    z_planes = product(x, transpose(factor) if transposed else factor, conj_b=conj)
    if less is None:
        return z_planes, None
    first = each(lambda plane, minus: 2 * plane - minus, z_planes, less)
    if v is None:
        return z_planes, first
    right = product(z_planes, transpose(v), conj_b=conj, alpha=-2)
    return z_planes, each(lambda *parts: torch.cat(parts, -1), first, right)


def _complex(a: SplitComplex | None) -> kernels.Pair | None:
    return None if a is None or a[1] is None else (a[0], a[1])


def each(function: Callable[..., Tensor], *planes: SplitComplex) -> SplitComplex:
    """Apply ``function`` to the real parts, and to the imaginary ones if there are any."""
    imag = [plane[1] for plane in planes]
    return function(*(plane[0] for plane in planes)), None if imag[0] is None else function(*imag)
