"""Residual connections that keep the Lipschitz constant."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.errors import EspalierError
from espalier.nn.lipschitz.constant import kernel_norm
from espalier.nn.lipschitz.inputs import check_floating, check_width
from espalier.nn.one_number import load_scalars
from espalier.sizes import whole_numbers


class ConvexSum(nn.Module):
    """Residual connection as a convex combination: (1 − c)·x + c·f(x), with c = sigmoid(``logit`` (1,)) learned.

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
        self.logit = nn.Parameter(torch.empty(1))
        self.register_load_state_dict_pre_hook(load_scalars)
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
        c = torch.sigmoid(self.logit)
        if y.dtype != x.dtype:  # under autocast, or an f that casts
            dtype = torch.promote_types(x.dtype, y.dtype)
            x, y = x.to(dtype), y.to(dtype)
        return torch.lerp(x, y, c.to(x.dtype))

    def lipschitz_constant_from(self, bound: Callable[[nn.Module], float]) -> float:
        """Return (1 − c) + c·L(f)."""
        c = torch.sigmoid(self.logit.detach().double()).item()
        return 1.0 + c * (bound(self.fn) - 1.0)


class LinearResidual(nn.Module):
    """Linear residual block x + W∗x + b, run as one convolution with the kernel W + δ.

    Its constant is that of W + δ, which ``kernel_norm`` bounds as a whole: at most 1 + L(W), and often far less. It is
    no ``nn.Conv2d``: tools that fold a batch norm into the weight of one, or quantise it, would leave δ out.

    Args:
        channels: C.
        kernel_size: k, odd.
        bias: add b.

    Shapes: (B, C, H, W) → (B, C, H, W), zeros around.

    Raises:
        EspalierError: sizes that are not whole numbers from 1, or an even kernel; on the input, other channels, or
            integers or complex numbers.

    Source: Hu et al., LiResNet, arXiv 2301.12549.
    """

    bias: nn.Parameter | None

    def __init__(self, channels: int, kernel_size: int = 3, bias: bool = True) -> None:
        channels, kernel_size = whole_numbers(channels=channels, kernel_size=kernel_size)
        if kernel_size % 2 == 0:
            raise EspalierError(f"kernel_size {kernel_size} of a residual has no centre: choose an odd number")
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw weights and bias uniformly from ±1/(k·√channels), torch's default."""
        bound = (self.weight.shape[1] * self.weight.shape[2] * self.weight.shape[3]) ** -0.5
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound, generator=generator)

    def residual_kernel(self) -> Tensor:
        """Return W + δ, shaped as W."""
        return _with_identity(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        """Return x + W∗x + b."""
        channels = len(self.weight)
        check_width(input, -3, channels, f"(B, {channels}, H, W)", most=4)
        check_floating(input)
        return F.conv2d(input, self.residual_kernel(), self.bias, padding=self.weight.shape[-1] // 2)

    def lipschitz_constant(self) -> float:
        """Return the bound of W + δ for every image size."""
        return kernel_norm(_with_identity(self.weight.detach().double()))  # in float32 the sum would be rounded

    def extra_repr(self) -> str:
        """Show the shape in ``print(model)``."""
        return f"{len(self.weight)}, kernel_size={self.weight.shape[-1]}, bias={self.bias is not None}"


def _with_identity(weight: Tensor) -> Tensor:
    reach = weight.shape[-1] // 2
    identity = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
    return weight + F.pad(identity[:, :, None, None], (reach,) * 4)
