"""Apply the Cayley transform of one real matrix to rows without forming it: what a linear layer trains with.

With the tall matrix [U; V] (W, or Wᵀ if W is wide), N = I + U − Uᵀ + VᵀV and rows x:

    square  z = x·N⁻ᵀ               y = 2z − x
    tall    z = x·N⁻ᵀ               y = [2z − x, −2z·Vᵀ]
    wide    z = (x₁ − x₂·V)·N⁻¹     y = 2z − x₁

Forming the matrix takes five products with V for every step beside the three that apply it; this takes two.
(arXiv 2104.07167, section 4; ``spectrum.operator`` does the same at every frequency of an image.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from espalier.nn.orthogonal.spectrum.split_complex import invert
from espalier.nn.precision import outside_graphs, without_autocast


@outside_graphs
def apply_cayley_matrix(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x·cayley(weight)ᵀ``, differentiable once in both.

    Args:
        x: (..., columns).
        weight: (rows, columns), real.

    Returns:
        (..., rows).
    """
    with torch.autocast(x.device.type, enabled=False):
        y: Tensor = _ApplyMatrix.apply(x.reshape(-1, x.shape[-1]), weight)
    return y.view(*x.shape[:-1], len(weight))


class _ApplyMatrix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """Return y; the formulas stand at the top of the file."""
        n, ctx.wide = min(weight.shape), weight.shape[0] < weight.shape[1]
        tall = weight.mT if ctx.wide else weight
        u, v = tall[:n], tall[n:]
        system = u - u.mT
        system.diagonal().add_(1)
        inverse = invert((system.addmm_(v.mT, v)[None], None))[0][0]
        if ctx.wide:
            head = x[:, :n]
            z = (torch.addmm(head, x[:, n:], v, alpha=-1)) @ inverse
            y = torch.lerp(head, z, 2.0)
        else:
            z = x @ inverse.mT
            y = x.new_empty(len(x), len(weight))
            torch.lerp(x, z, 2.0, out=y[:, :n])
            if len(v):
                torch.mm(z, v.mT, out=y[:, n:]).mul_(-2)
        ctx.save_for_backward(x, weight, inverse, z)
        return y

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the gradients of x and of the weight, with ∂U = ∂N − ∂Nᵀ and V(∂N + ∂Nᵀ) added to ∂V.

        Wide: s = 2g·N⁻ᵀ, ∂x = [s − g, −s·Vᵀ], ∂N = −zᵀs, ∂V = −x₂ᵀs. Else, with g = [g₁, g₂]: s = 2(g₁ − g₂V)·N⁻¹,
        ∂x = s − g₁, ∂N = −sᵀz, ∂V = −2g₂ᵀz.
        """
        x, weight, inverse, z = ctx.saved_tensors
        n = len(inverse)
        v = (weight.mT if ctx.wide else weight)[n:]
        if ctx.wide:
            s = (grad @ inverse.mT).mul_(2)
            grad_x = x.new_empty(x.shape)
            torch.sub(s, grad, out=grad_x[:, :n])
            torch.mm(s, v.mT, out=grad_x[:, n:]).neg_()
        else:
            head = grad[:, :n]
            s = torch.addmm(head, grad[:, n:], v, alpha=-1).mul_(2) @ inverse
            grad_x = s - head
        if not ctx.needs_input_grad[1]:
            return grad_x, None
        low = (x[:, n:].mT @ s).neg_() if ctx.wide else (grad[:, n:].mT @ z).mul_(-2)
        grad_n = (z.mT @ s if ctx.wide else s.mT @ z).neg_()
        low.addmm_(v, grad_n + grad_n.mT)
        grad_tall = torch.cat((grad_n - grad_n.mT, low))
        return grad_x, grad_tall.mT if ctx.wide else grad_tall
