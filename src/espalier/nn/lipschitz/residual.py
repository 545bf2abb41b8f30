"""Residual connections that keep the Lipschitz constant."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from espalier.errors import EspalierError


class ConvexSum(nn.Module):
    """Residual connection as a convex combination: (1 − c)·x + c·f(x), with c = sigmoid(``logit``) learned.

    Its constant is (1 − c) + c·L(f), which is 1 where f is 1-Lipschitz; the plain x + f(x) would have 2.

    Args:
        fn: f, which keeps the shape of its input.
        coefficient: c at the start, strictly between 0 and 1.

    Raises:
        EspalierError: a coefficient outside (0, 1); on the input, an f that changes the shape.

    Source: Trockman & Kolter, arXiv 2104.07167, section 5 (the residual nets).
    """

    def __init__(self, fn: nn.Module, coefficient: float = 0.5) -> None:
        super().__init__()
        if not 0 < coefficient < 1:
            raise EspalierError(f"coefficient {coefficient} of a convex sum: choose a number strictly between 0 and 1")
        self.fn, self.coefficient = fn, float(coefficient)
        self.logit = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set c back to its start; nothing is drawn."""
        self.logit.fill_(math.log(self.coefficient / (1 - self.coefficient)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the combination of x and f(x)."""
        y = self.fn(x)
        if y.shape != x.shape:
            raise EspalierError(f"f turns {tuple(x.shape)} into {tuple(y.shape)}: it must keep the shape of its input")
        return torch.lerp(x, y, torch.sigmoid(self.logit).to(x.dtype))

    def lipschitz_constant_from(self, bound: Callable[[nn.Module], float]) -> float:
        """Return (1 − c) + c·L(f)."""
        c = torch.sigmoid(self.logit.detach().double()).item()
        return 1.0 + c * (bound(self.fn) - 1.0)
