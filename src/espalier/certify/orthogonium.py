"""Rules of the activations of the library orthogonium, for users' own networks; it is never loaded from here.

| activation | constant |
|---|---|
| MaxMin | 1 |
| SoftHuber | 1 |
| HouseHolder | 1/√2: pairs that are kept or reflected, and divided by √2 |
| HouseHolder_Order_2 | 1/√2 in real arithmetic; as it runs it has none, see there |

A rule is about the source of one forward pass, by its SHA-256: another version of the library, or a changed class, is
followed into its operations as any other module is.

Source: orthogonium 0.0.4, layers/custom_activations.py; Singla, Singla & Feizi, arXiv 2108.04062.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import sys
from typing import Any

import torch
from torch import nn

from espalier.certify.arithmetic import unit
from espalier.certify.bounded import Analysis
from espalier.certify.layers import RULES, Forward, layer, permutation
from espalier.certify.refusal import UncertifiableError
from espalier.certify.value import Bound, Term

_PART = "its pairs are not those of (B, C, H, W) along axis 1 with one angle each: give it the channels that it has"


def max_min(analysis: Analysis, module: Any, x: Bound, forward: Forward) -> Bound:
    """1, and no rounding; along the batch, images would meet."""
    if module.axis % x.numbers.ndim == 0:
        raise UncertifiableError("it sorts the batch, so that images would meet")
    return permutation(analysis, module, x, forward)


def soft_huber(analysis: Analysis, module: Any, x: Bound, forward: Forward) -> Bound:
    """1, the largest slope of δ·(√(1 + (z/δ)²) − 1)."""
    delta = module.delta
    if not isinstance(delta, int | float) or not math.isfinite(1 / delta if delta else math.inf) or math.isinf(delta):
        raise UncertifiableError(f"its delta is {delta!r}: give a finite number that is not zero")
    if x.value is None:
        return analysis.exact(x, None)
    value = forward(x.value)
    u, most = 16 * unit(value.dtype), math.sqrt(torch.finfo(value.dtype).max)
    # (z/δ)² is finite up to |z| = |δ|·√max.
    size = abs(delta) * math.sqrt(value[0].numel())
    return analysis.combine(value, [Term(x, 1.0, u, most / abs(delta))], absolute=u * size)


def householder(analysis: Analysis, module: Any, x: Bound, forward: Forward) -> Bound:
    """1/√2: continuous, and on either side of its hyperplane an isometry divided by √2.

    Sines are right to 8 units, the test to 16‖z‖; at worst that swaps a vector 16 units from the hyperplane for its
    mirror image. Both together, and the two products, stay below 128 units.
    """
    _expect_pairs(x, module, module.theta)
    value = forward(x.numbers)
    return analysis.combine(value, [Term(x, math.sqrt(0.5), 128 * unit(value.dtype), 2.0)])


def householder_2(analysis: Analysis, module: Any, x: Bound, forward: Forward) -> Bound:
    """1/√2 in real arithmetic: in each of four sectors an isometry over √2, equal at their borders."""
    _expect_pairs(x, module, module.theta0, module.theta1, module.theta2)
    if analysis.rounding:
        raise UncertifiableError(
            "an angle that rounding takes to 2π lies in none of its sectors, and it then returns 0: use HouseHolder"
        )
    return analysis.exact(x, forward(x.numbers), math.sqrt(0.5))


def _expect_pairs(x: Bound, module: Any, *angles: Any) -> None:
    shape = x.numbers.shape
    if module.axis != 1 or len(shape) != 4 or any(2 * angle.numel() != shape[1] for angle in angles):
        raise UncertifiableError(_PART)
    if not all(bool(angle.isfinite().all()) for angle in angles):
        raise UncertifiableError("its angles are not finite")


_RULES = {
    "MaxMin": (max_min, "541ce674456240e72c9388ad0cc1ef2dac7d89af91dc30c45b85bb853d671817"),
    "SoftHuber": (soft_huber, "d1cb13e7f9e99f9187b9ba890699f779eea4dbe762c479bbf74de0c4e92fd6f1"),
    "HouseHolder": (householder, "f6681f35903c2d11107d4118f4ac162177037df8e9bba3120b74a134c2d1b8b7"),
    "HouseHolder_Order_2": (householder_2, "ecdb183a8ae13209f45230532913390abedebca5b2cb42bcbbc003030a6b3ac4"),
}
"""By the name of the class: its rule, and the source of the forward pass that the rule is about."""


def enter_rules() -> None:
    """Enter the rules if the library has been imported, for the classes whose forward pass is the known one."""
    module = sys.modules.get("orthogonium.layers.custom_activations")
    for name, (rule, known) in _RULES.items():
        cls = getattr(module, name, None)
        if isinstance(cls, type) and issubclass(cls, nn.Module) and cls not in RULES and _source(cls) == known:
            layer(cls)(rule)


def _source(cls: type[nn.Module]) -> str:
    try:
        return hashlib.sha256(inspect.getsource(cls.forward).encode()).hexdigest()
    except (OSError, TypeError):  # the source is not at hand
        return ""
