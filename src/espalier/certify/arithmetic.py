"""Rounded-up arithmetic: unit roundoffs, γ_n, norms that neither overflow nor underflow, norms of linear maps.

With unit roundoff u, a sum of n products in any order, with or without fused operations, is off by at most
γ_n·Σ|a_i b_i|, γ_n = n·u/(1 − n·u). (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from espalier.certify.refusal import UncertifiableError

_UNITS = {torch.float64: 2.0**-53, torch.float32: 2.0**-24}
_CASTS = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
_SLACK = 1.0 + 2.0**-46
"""Covers the few roundings of one number that is computed in float64 here, many times over."""


def unit(dtype: torch.dtype) -> float:
    """Return the unit roundoff of an arithmetic in which sums are bounded.

    Raises:
        UncertifiableError: half precision and integers.
    """
    if dtype not in _UNITS:
        raise UncertifiableError(f"it computes in {str(dtype).removeprefix('torch.')}: only float32 and float64 are "
                                 "bounded, convert the network")  # fmt: skip
    return _UNITS[dtype]


def cast_unit(dtype: torch.dtype) -> float:
    """Return the unit roundoff of a conversion to ``dtype``."""
    return _CASTS[dtype] if dtype in _CASTS else unit(dtype)


def gamma(n: float, dtype: torch.dtype) -> float:
    """Return γ_n of an arithmetic, rounded up.

    Raises:
        UncertifiableError: sums so long, in so few digits, that nothing is left.
    """
    product = (n + 2) * unit(dtype)
    if product > 0.1:
        raise UncertifiableError(f"it sums {n:g} terms in {str(dtype).removeprefix('torch.')}: use float64")
    return product / (1 - product) * _SLACK


def up(*factors: float) -> float:
    """Return the product of non-negative factors, rounded up at every step that rounds.

    A factor that is not finite gives infinity: nothing is known then.
    """
    total = 1.0
    for factor in factors:
        if not math.isfinite(factor):
            return math.inf
        if total == 0.0 or factor == 0.0:
            return 0.0
        exact = 1.0 in (total, factor)
        total = total * factor if exact else math.nextafter(total * factor, math.inf)
    return total


def add_up(*terms: float) -> float:
    """Return the sum of non-negative terms, rounded up at every step that rounds."""
    total = 0.0
    for term in terms:
        exact = 0.0 in (total, term)
        total = total + term if exact else math.nextafter(total + term, math.inf)
    return total


def image_norms(value: Tensor) -> Tensor:
    """Return (N,) float64 upper bounds on the ℓ2 norm of every image of a batch (N, …), of any scale."""
    axes = tuple(range(1, value.ndim))
    if not axes or value[0].numel() == 0:
        return value.abs().double() if not axes else value.new_zeros(len(value), dtype=torch.float64)
    count = value[0].numel()
    norms = torch.linalg.vector_norm(value, dim=axes, dtype=torch.float64)
    # Squares outside this range lose digits: those images are scaled first.
    odd = ~((norms > 1e-140) & (norms < 1e140))
    if odd.any():
        some = value[odd].double().flatten(1)
        scale = some.abs().amax(1).clamp_min(5e-324)
        # In two steps: the inverse of a denormal number overflows.
        unscaled = some / scale[:, None]
        norms[odd] = torch.linalg.vector_norm(unscaled, dim=1) * scale
    return norms * (_SLACK + count * 2.0**-52) + math.sqrt(count) * 5e-324


def tensor_norm(value: Tensor) -> float:
    """Return an upper bound on the ℓ2 norm of all numbers of a tensor."""
    return image_norms(value.detach().reshape(1, -1)).item()


def spread_norm(constant: Tensor, value: Tensor) -> float:
    """Return an upper bound on the ℓ2 norm of a constant that is broadcast over one image of a value (N, …)."""
    return up(tensor_norm(constant), math.sqrt(value[0].numel() / max(1, constant.numel())) * (1 + 1e-15))


def root_up(value: float) -> float:
    """Return the square root, rounded up unless it is a whole number."""
    root = math.sqrt(value)
    if not math.isfinite(root):
        return math.inf
    return root if root == math.floor(root) else math.nextafter(root, math.inf)


class Norms:
    """Norms of the linear maps of one network, computed once for the same numbers, whatever tensor holds them.

    A weight that is made anew in every forward pass (by a parametrisation, say) is recognised by its contents.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, list[tuple[Tensor, Any]]] = {}

    def of(self, compute: Callable[..., Any], weight: Tensor, *settings: Hashable) -> Any:
        """Return ``compute(weight, *settings)``, remembered for the contents of the weight."""
        weight = weight.detach()
        entries = self._known.setdefault((compute, settings, weight.shape, weight.dtype), [])
        for then, result in entries:
            if torch.equal(then, weight):
                return result
        result = compute(weight, *settings)
        entries.append((weight.clone(), result))
        return result


def orthogonality_excess(real: Tensor, imag: Tensor | None) -> float:
    """Return an upper bound on max ‖QᴴQ − I‖_F over matrices Q (N, p, q), taken on their shorter side.

    The singular values of every Q lie within √(1 ± excess). Rounding of the product is added: infinite if a number is
    not finite.

    Args:
        real: real parts, or the matrices themselves.
        imag: imaginary parts, or None.
    """
    planes = [plane.detach().double() for plane in (real, imag) if plane is not None]
    if real.shape[-2] < real.shape[-1]:
        planes = [plane.mT for plane in planes]
    worst = 0.0
    for start in range(0, len(real), 64):  # a part at a time: the Gram matrices need not exist all at once
        part = [plane[start : start + 64] for plane in planes]
        gram = torch.stack([plane.mT @ plane for plane in part]).sum(0)
        magnitude = torch.stack([plane.abs() for plane in part]).sum(0)
        gram.diagonal(dim1=1, dim2=2).sub_(1)
        squares = gram.square().sum((1, 2))
        if len(part) == 2:
            cross = part[0].mT @ part[1]
            squares += (cross - cross.mT).square().sum((1, 2))
        lost = 4 * gamma(len(part) * max(real.shape[-2:]), torch.float64)
        charge = lost * (magnitude.mT @ magnitude).square().sum((1, 2)).sqrt()
        found = (squares.sqrt() + charge).max().item()
        if not math.isfinite(found):
            return math.inf
        worst = max(worst, found)
    return worst * _SLACK


def orthogonal_norm(matrices: Tensor) -> float:
    """Return an upper bound on the spectral norm of matrices (N, p, q) that are nearly orthogonal."""
    return root_up(1.0 + orthogonality_excess(matrices, None))


def windows(kernel: Sequence[int], stride: Sequence[int]) -> int:
    """Return how many windows can cover one input, Π ⌈k/s⌉."""
    return math.prod(-(-k // s) for k, s in zip(kernel, stride, strict=True))


def per_axis(value: Any, axes: int) -> tuple[int, ...]:
    """Return a number, or a list of one or of ``axes``, as one number for every axis."""
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    return values if len(values) == axes else values * axes


def room_left(peak: Tensor, slope: float, dtype: torch.dtype) -> Tensor:
    """Return up to which radius numbers of size peak + slope·r are finite, (N,)."""
    # A quarter of the range: intermediate sums may be a few times larger than what they end in.
    limit = torch.finfo(dtype).max / 4 if dtype.is_floating_point else math.inf
    left = limit - peak
    room = left / slope if slope > 0 else torch.where(left > 0, math.inf, -math.inf)
    return torch.where(torch.isnan(left) | (left <= 0), -math.inf, room)
