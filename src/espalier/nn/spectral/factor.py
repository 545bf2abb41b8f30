"""Solve with many right-hand sides: a block LU factorisation in planes, with explicit inverses on the diagonal."""

from __future__ import annotations

from espalier.nn.spectral.planes import Planes, block, contiguous, copy_, invert, product, transpose

# Below this size the explicit inverse costs no more than the factorisation and its substitutions.
_WIDTH = 64


def factor_(n: Planes) -> Planes:
    """Factor matrices whose Hermitian part is at least I as N = L·U by blocks, in place (Crout's order).

    Below the block diagonal stands L (unit diagonal blocks), above it U, on it the *inverses* of U's diagonal blocks.
    A matrix of one block is simply inverted.

    Args:
        n: contiguous planes (N, n, n), overwritten.
    """
    size = n[0].shape[-1]
    for start in range(0, size, _WIDTH):
        stop = min(start + _WIDTH, size)
        done, here, rest, below = slice(0, start), slice(start, stop), slice(stop, size), slice(start, size)
        column = contiguous(block(n, below, here))
        if start:
            product(block(n, below, done), block(n, done, here), into=column, alpha=-1)
            if stop < size:
                row = contiguous(block(n, here, rest))
                product(block(n, here, done), block(n, done, rest), into=row, alpha=-1)
                copy_(block(n, here, rest), row)
        inverse = invert(block(column, slice(0, stop - start), slice(None)))
        copy_(block(n, here, here), inverse)
        if stop < size:
            copy_(block(n, rest, here), product(block(column, slice(stop - start, None), slice(None)), inverse))
    return n


def solve(x: Planes, factor: Planes, *, transposed: bool = False, conj: bool = False) -> Planes:
    """Return x·N⁻¹, with N first transposed and conjugated as asked.

    Args:
        x: rows, planes (N, B, n); left untouched.
        factor: what ``factor_`` made of N.
        transposed: use Nᵀ.
        conj: use the conjugate of N.
    """
    size = factor[0].shape[-1]
    if size <= _WIDTH:
        return product(x, transpose(factor) if transposed else factor, conj_b=conj)
    cuts = [slice(start, min(start + _WIDTH, size)) for start in range(0, size, _WIDTH)]
    z, every = contiguous(x), slice(None)
    # First the factor whose variables come in order, then the one that runs backwards; only U's blocks need inverses.
    for index, here in enumerate(cuts):
        part = contiguous(block(z, every, here))
        if index:
            done = slice(0, here.start)
            earlier = transpose(block(factor, here, done)) if transposed else block(factor, done, here)
            product(block(z, every, done), earlier, conj_b=conj, into=part, alpha=-1)
        copy_(block(z, every, here), part if transposed else product(part, block(factor, here, here), conj_b=conj))
    for here in reversed(cuts):
        part = contiguous(block(z, every, here))
        if here.stop < size:
            rest = slice(here.stop, size)
            later = transpose(block(factor, here, rest)) if transposed else block(factor, rest, here)
            product(block(z, every, rest), later, conj_b=conj, into=part, alpha=-1)
        if transposed:
            part = product(part, transpose(block(factor, here, here)), conj_b=conj)
        copy_(block(z, every, here), part)
    return z
