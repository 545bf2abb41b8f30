"""The orthogonal linear layer, and what it shares with pointwise convolutions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.errors import EspalierError
from espalier.nn.one_number import load_scalars
from espalier.nn.orthogonal.spectrum.cache import OperatorCache
from espalier.nn.orthogonal.transform import apply_cayley_matrix, cayley
from espalier.nn.precision import is_tracing, outside_graphs, takes_batches, upcast, without_autocast
from espalier.sizes import whole_numbers


class OrthogonalLayer(nn.Module):
    """The parameters that orthogonal layers share, and the cache of their operators."""

    weight: nn.Parameter
    alpha: nn.Parameter
    bias: nn.Parameter | None

    def _create(
        self,
        shape: tuple[int, ...],
        biases: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        generator: torch.Generator | None,
    ) -> None:
        """Make and draw the parameters: a weight of this shape and so many biases."""
        if dtype is not None and not dtype.is_floating_point:
            raise EspalierError(f"dtype {dtype} of an orthogonal layer: choose a real floating-point one")
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.alpha = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(biases, device=device, dtype=dtype)) if biases else None
        self._cache = OperatorCache()
        self.register_load_state_dict_pre_hook(load_scalars)
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw weight and bias uniformly from ±1/√fan-in, torch's default, and set α to ‖weight‖; no-op on meta."""
        if self.weight.is_meta:
            return
        bound = 1 / math.sqrt(math.prod(self.weight.shape[1:]))
        self.weight.uniform_(-bound, bound, generator=generator)
        self.alpha.copy_(torch.linalg.vector_norm(self.weight.double()))
        if self.bias is not None:
            self.bias.uniform_(-bound, bound, generator=generator)

    def _bias_of(self, outputs: int) -> nn.Parameter | None:
        """Return the bias; refuse one that is not a number an output, which would be broadcast or not read to its end.

        What adds it differs from one path to another, and not each of them looks.
        """
        if self.bias is not None and self.bias.shape != (outputs,):
            raise EspalierError(f"bias is {tuple(self.bias.shape)}: give ({outputs},), one number an output")
        return self.bias


class CayleyLinear(OrthogonalLayer):
    """Linear map with an orthogonal matrix: ``y = cayley(α·W/‖W‖) x + b``.

    Rows are orthonormal if it has no more outputs than inputs, columns if it has no fewer, so its Lipschitz constant
    is 1. Training applies the matrix to the batch without forming it; evaluation keeps the matrix, built in float64,
    while the parameters keep their contents.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        bias: add a learned vector.
        device: of the parameters.
        dtype: of the parameters. Half-precision ones, and any autocast, still compute in float32.
        generator: source of the initial weights.

    Parameters: ``weight`` (out, in) and ``bias`` uniform on ±1/√in, and the scale ``alpha`` (1,), ‖weight‖ at first.

    Shapes: (..., in) → (..., out).

    Raises:
        EspalierError: a width that is no whole number from 1, or a dtype that is not floating-point; on the input,
            another width, or integers or complex numbers.

    Source: arXiv 2104.07167, section 4.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        in_features, out_features = whole_numbers(in_features=in_features, out_features=out_features)
        self.in_features, self.out_features = in_features, out_features
        self._create((out_features, in_features), out_features if bias else 0, device, dtype, generator)

    @outside_graphs
    @without_autocast
    def forward(self, x: Tensor) -> Tensor:
        """Return Qx + b for x (..., in)."""
        if x.ndim < 1 or x.shape[-1] != self.in_features:
            raise EspalierError(f"input is {tuple(x.shape)}: give (..., {self.in_features})")
        weight = self.weight  # one look: a parametrised weight is made at each
        wide, weight, alpha, bias = upcast(x, weight, self.alpha, self._bias_of(len(weight)))
        if not self.training:
            return F.linear(wide, orthogonal_matrix(self, 1, wide.dtype)[0], bias).to(x.dtype)
        y = apply_cayley_matrix(wide, scaled(weight, alpha))
        return (y if bias is None else y + bias).to(x.dtype)

    def extra_repr(self) -> str:
        """Show the shape in ``print(model)``."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


def scaled(weight: Tensor, alpha: Tensor) -> Tensor:
    """Return ``α·w/‖w‖``, and zeros with finite gradients for a weight of zeros."""
    if is_tracing():
        return weight * (alpha / _norm(weight))
    out: Tensor = _Scale.apply(weight, alpha)
    return out


# One for all dtypes: training computes in float32 and evaluation in float64, and both are to be the same function.
_LEAST_NORM = torch.finfo(torch.float64).eps


def _norm(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight).clamp_min(_LEAST_NORM)


class _Scale(torch.autograd.Function):
    """``scaled`` with ∂w = α/n·(∂y − w·⟨∂y, w⟩/n²): autograd's own rule passes seven times over a large weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, alpha: Tensor) -> Tensor:
        norm = _norm(weight)
        ctx.save_for_backward(weight, alpha, norm)
        return weight * (alpha / norm)

    @staticmethod
    @takes_batches
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        weight, alpha, norm = ctx.saved_tensors
        if torch.is_grad_enabled():  # someone differentiates twice: the norm must lead back to the weight
            norm = _norm(weight)
        # Gradients of wide layers come transposed, and every pass over them would be.
        grad = grad.contiguous()
        along = torch.dot(grad.view(-1), weight.reshape(-1)) / norm
        # There the norm is a constant.
        along_weight = torch.where(norm > _LEAST_NORM, along / norm, 0.0)
        return torch.addcmul(grad, weight, -along_weight) * (alpha / norm), along.view(alpha.shape)


def orthogonal_matrix(layer: OrthogonalLayer, groups: int, dtype: torch.dtype) -> Tensor:
    """Return the Cayley transforms (G, outputs/G, inputs/G) of a layer's matrices, from its cache in evaluation."""

    def build(weight: Tensor, alpha: Tensor) -> Tensor:
        return cayley(scaled(*upcast(weight, alpha)).view(groups, -1, weight.shape[1]))

    if layer.training:
        return build(layer.weight, layer.alpha).to(dtype)
    return layer._cache.get(("matrix", groups), (layer.weight, layer.alpha), build, dtype)
