"""The Cayley layers as their authors' repository computes them: rfft2, torch.linalg.inv, permutes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def original_cayley(matrix: Tensor) -> Tensor:
    """Return [(I + A)⁻¹(I − A); −2V(I + A)⁻¹] for a batch (F, outputs, inputs)."""
    _, outputs, inputs = matrix.shape
    if inputs > outputs:
        return original_cayley(matrix.transpose(1, 2)).transpose(1, 2)
    u, v = matrix[:, :inputs], matrix[:, inputs:]
    eye = torch.eye(inputs, dtype=matrix.dtype, device=matrix.device)[None]
    a = u - u.conj().transpose(1, 2) + v.conj().transpose(1, 2) @ v
    inverse = torch.linalg.inv(eye + a)
    return torch.cat((inverse @ (eye - a), -2 * v @ inverse), dim=1)


def original_spectrum(weight: Tensor, height: int, width: int) -> Tensor:
    """Return the kernel's half spectrum (F, outputs, inputs), the tap (k − 1)//2 of either axis at the origin."""
    outputs, inputs, rows, columns = weight.shape
    down = torch.arange(height, dtype=torch.float64, device=weight.device)[:, None] * ((rows - 1) // 2) / height
    right = torch.arange(width // 2 + 1, dtype=torch.float64, device=weight.device) * ((columns - 1) // 2) / width
    shift = torch.polar(down.new_ones(()), -2 * math.pi * (down + right))
    taps = torch.fft.rfft2(weight, (height, width)).reshape(outputs, inputs, -1).permute(2, 0, 1).conj()
    return shift.reshape(-1, 1, 1).to(taps.dtype) * taps


def original_convolution(x: Tensor, weight: Tensor, alpha: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Return the layer's output; α is the spectrum's norm if none is given, as on the original's first forward."""
    batch, inputs, height, width = x.shape
    half = width // 2 + 1
    x_hat = torch.fft.rfft2(x).permute(2, 3, 1, 0).reshape(height * half, inputs, batch)
    w_hat = original_spectrum(weight, height, width)
    scale = 1 if alpha is None else alpha / w_hat.norm()
    y_hat = (original_cayley(scale * w_hat) @ x_hat).reshape(height, half, -1, batch)
    y = torch.fft.irfft2(y_hat.permute(3, 2, 0, 1), s=(height, width))
    return y if bias is None else y + bias[:, None, None]


class OriginalCayleyConv(nn.Conv2d):
    """The original layer with its α, for one image size; stride 2 quarters the image and halves the kernel."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int, size: int, stride: int = 1) -> None:
        super().__init__(inputs * stride**2, outputs, kernel_size if stride == 1 else max(1, kernel_size // 2))
        self.downsample = stride
        norm = original_spectrum(self.weight.detach(), size // stride, size // stride).norm()
        self.alpha = nn.Parameter(norm)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output."""
        return original_convolution(F.pixel_unshuffle(x, self.downsample), self.weight, self.alpha, self.bias)


class OriginalCayleyLinear(nn.Linear):
    """The original linear layer, without its stale cache."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.alpha = nn.Parameter(self.weight.detach().norm())

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output."""
        return F.linear(x, original_cayley((self.alpha * self.weight / self.weight.norm())[None])[0], self.bias)
