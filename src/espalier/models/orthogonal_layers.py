"""The convolutions that a Lipschitz net can be built from: ours, and those of the library orthogonium."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espalier.errors import require, unknown_name
from espalier.nn.lipschitz.constant import kernel_norm
from espalier.nn.orthogonal.conv import CayleyConv2d

ORTHOGONIUM = {"aoc": ("AOC", "AdaptiveOrthoConv2d"), "soc": ("adaptiveSOC", "AdaptiveSOCConv2d")}


def orthogonal_conv(layer: str, inputs: int, outputs: int, kernel_size: int, stride: int = 1) -> nn.Module:
    """Return an orthogonal convolution with circular padding and a bias.

    Args:
        layer: ``"cayley"``, ``"aoc"`` or ``"soc"``.
        inputs: channels in.
        outputs: channels out.
        kernel_size: taps along each axis on the coarse grid: one tap of a layer with stride s covers s pixels.
        stride: s.

    Raises:
        EspalierError: an unknown layer.
        MissingExtraError: orthogonium is not installed.
    """
    if layer == "cayley":
        return CayleyConv2d(inputs, outputs, kernel_size, stride=stride)
    if layer not in ORTHOGONIUM:
        raise unknown_name("layer", layer, ("cayley", *ORTHOGONIUM))
    return OrthogoniumConv2d(layer, inputs, outputs, kernel_size * stride, stride)


class OrthogoniumConv2d(nn.Module):
    """An orthogonal convolution of orthogonium with circular padding: AOC (arXiv 2501.07930) or SOC (2105.11417).

    Their kernels are explicit but orthogonal only up to the convergence of an iteration, so the constant is not taken
    for 1: it is bounded from the kernel (``kernel_norm``).

    Args:
        layer: ``"aoc"`` or ``"soc"``.
        inputs: channels in.
        outputs: channels out.
        kernel_size: taps along each axis, in pixels.
        stride: s, at most the kernel's size.

    Shapes: (B, inputs, H, W) → (B, outputs, ⌈H/s⌉, ⌈W/s⌉).

    Raises:
        MissingExtraError: orthogonium is not installed.
    """

    def __init__(self, layer: str, inputs: int, outputs: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        package, factory = ORTHOGONIUM[layer]
        module = require(f"orthogonium.layers.conv.{package}", "peers")
        self.conv = getattr(module, factory)(
            inputs, outputs, kernel_size, stride=stride, padding=0, padding_mode="circular", bias=True
        )
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Pad around the torus by the kernel's reach and apply the kernel."""
        weight = self._kernel()
        reach = max(0, weight.shape[-1] - self.stride)
        low = reach // 2
        padded = F.pad(x, (low, reach - low, low, reach - low), mode="circular")
        return F.conv2d(padded, weight, self.conv.bias, self.stride)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OrthogoniumConv2d:
        # The library's normalisations note their dtype when they are made, and fail after ``double()``.
        super()._apply(fn, recurse)
        for part in self.modules():
            if isinstance(getattr(part, "dtype", None), torch.dtype):
                part.dtype = self.conv.bias.dtype
        return self

    def lipschitz_constant(self) -> float:
        """Return the bound of the kernel as it is now."""
        weight = self._kernel()
        return kernel_norm(weight, cover=1 if weight.shape[-1] == self.stride else None)

    def _kernel(self) -> Tensor:
        """Return the kernel; in evaluation it is the same at every call."""
        if self.training:
            return self.conv.weight
        # The library's power iteration goes on from where it was: a kernel would move whenever it is asked for.
        vectors = [(p, p.detach().clone()) for p in self.conv.parameters() if not p.requires_grad]
        weight = self.conv.weight
        with torch.no_grad():
            for vector, before in vectors:
                vector.copy_(before)
        return weight
