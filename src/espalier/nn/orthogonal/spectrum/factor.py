"""Solve with many right-hand sides: a block LU factorisation in planes, with explicit inverses on the diagonal."""

from __future__ import annotations

from typing import NamedTuple

from espalier.nn.orthogonal.spectrum.split_complex import Planes, block, contiguous, copy_, invert, product, transpose
from espalier.nn.precision import differentiable

# Up to this size the explicit inverse costs no more than a factorisation and its substitutions; above, rows of a block.
_WHOLE, _WIDTH = 128, 64


class Factor(NamedTuple):
    """A factorisation of matrices (N, n, n): their inverses if ``whole``, else what ``factor_`` describes."""

    planes: Planes
    whole: bool


def factor_(n: Planes) -> Factor:
    """Factor matrices whose Hermitian part is at least I as N = L·U by blocks, in place (Crout's order).

    Below the block diagonal stands L (unit diagonal blocks), above it U, on it the *inverses* of U's diagonal blocks.
    A matrix of one block is simply inverted, and so is every matrix whose factors autograd must follow.

    Args:
        n: contiguous planes (N, n, n), which may be overwritten.
    """
    size = n[0].shape[-1]
    if size <= _WHOLE or differentiable(*n):
        return Factor(invert(n), whole=True)
    for start in range(0, size, _WIDTH):
        stop = min(start + _WIDTH, size)
        done, here, rest, below = slice(0, start), slice(start, stop), slice(stop, size), slice(start, size)
        if start:
            product(block(n, below, done), block(n, done, here), into=block(n, below, here), alpha=-1)
            if stop < size:
                product(block(n, here, done), block(n, done, rest), into=block(n, here, rest), alpha=-1)
        inverse = invert(block(n, here, here))
        copy_(block(n, here, here), inverse)
        if stop < size:
            copy_(block(n, rest, here), product(block(n, rest, here), inverse))
    return Factor(n, whole=False)


def solve(x: Planes, factored: Factor, *, transposed: bool = False, conj: bool = False) -> Planes:
    """Return x·N⁻¹, with N first transposed and conjugated as asked.

    Args:
        x: rows, planes (N, B, n); left untouched.
        factored: what ``factor_`` made of N.
        transposed: use Nᵀ.
        conj: use the conjugate of N.
    """
    factor, whole = factored
    size = factor[0].shape[-1]
    if whole:
        return product(x, transpose(factor) if transposed else factor, conj_b=conj)
    cuts = [slice(start, min(start + _WIDTH, size)) for start in range(0, size, _WIDTH)]
    z, every = contiguous(x), slice(None)
    # First the factor whose variables come in order, then the one that runs backwards; only U's blocks need inverses.
    for here in cuts:
        part = block(z, every, here)
        if here.start:
            done = slice(0, here.start)
            earlier = transpose(block(factor, here, done)) if transposed else block(factor, done, here)
            product(block(z, every, done), earlier, conj_b=conj, into=part, alpha=-1)
        if not transposed:
            copy_(part, product(part, block(factor, here, here), conj_b=conj))
    for here in reversed(cuts):
        part = block(z, every, here)
        if here.stop < size:
            rest = slice(here.stop, size)
            later = transpose(block(factor, here, rest)) if transposed else block(factor, rest, here)
            product(block(z, every, rest), later, conj_b=conj, into=part, alpha=-1)
        if transposed:
            copy_(part, product(part, transpose(block(factor, here, here)), conj_b=conj))
    return z
