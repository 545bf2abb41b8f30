"""How far apart two computations of the same numbers may lie: a bound from the arithmetic, not from one machine.

Two code paths (with and without gradients, one thread or four, AVX-512 or plain loops, another library) add the same
terms in another order. A sum of n products, in any order and with or without fused operations, is off by at most
γ_n Σ|x_i y_i|, where γ_n = n u / (1 − n u) and u is half the spacing of floating-point numbers at 1 (Higham, Accuracy
and Stability of Numerical Algorithms, 2nd edition, section 3.1). Two of them lie within 2 γ_n Σ|x_i y_i|.

Bit-equality is asked only where the same call is repeated on the same machine, or where numbers are moved and not
computed: resume, guard, checkpoints, permutations, conversions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gamma(terms: int, dtype: torch.dtype) -> float:
    """Return γ_n = n u / (1 − n u): the relative error of a sum of n products in ``dtype``, in any order."""
    error = terms * torch.finfo(dtype).eps / 2
    assert error < 0.5, f"{terms} terms in {dtype}: the bound says nothing"
    return error / (1 - error)


def assert_equal_up_to_rounding(
    ours: Tensor, theirs: Tensor, *, terms: int, scale: float | Tensor | None = None, condition: float = 1.0
) -> None:
    """Assert |ours − theirs| ≤ 2 κ γ_n s everywhere, in the coarser of the two dtypes.

    Args:
        ours: any shape.
        theirs: the same shape.
        terms: n, the roundings on the longest way from an input to an output: the lengths of the sums one after the
            other, added up.
        scale: s ≥ Σ|x_i y_i| of every output, one number or a tensor that broadcasts; the largest |theirs| by default,
            which is right where terms do not cancel.
        condition: κ, how much a step in between magnifies an error, such as the condition number of a solve.
    """
    assert ours.shape == theirs.shape, f"shapes {tuple(ours.shape)} and {tuple(theirs.shape)}"
    dtype = max(ours.dtype, theirs.dtype, key=lambda kind: torch.finfo(kind).eps)
    ours, theirs = ours.detach().double(), theirs.detach().double()
    size = torch.as_tensor(theirs.abs().max() if scale is None else scale).detach().double()
    bound = (2 * condition * gamma(terms, dtype) * size).expand(theirs.shape)
    excess = (ours - theirs).abs() - bound
    # NaN compares false: ask for what must hold.
    if not bool((excess <= 0).all()):
        place = tuple(int(i) for i in torch.unravel_index(excess.nan_to_num(torch.inf).argmax(), excess.shape))
        raise AssertionError(
            f"at {place}: {ours[place]:.9g} and {theirs[place]:.9g} differ by {(ours - theirs).abs()[place]:.3g}, "
            f"rounding allows {bound[place]:.3g} ({terms} terms in {dtype}, condition {condition:.3g})"
        )
