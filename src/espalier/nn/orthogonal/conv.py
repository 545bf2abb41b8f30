"""Convolutions that are orthogonal by construction on any torus: the Cayley transform of their kernel's spectrum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from espalier.errors import EspalierError, unknown_name
from espalier.nn.orthogonal.linear import OrthogonalLayer, orthogonal_matrix, scaled
from espalier.nn.orthogonal.shuffle import (
    blocks_last,
    channels_first,
    channels_last,
    check_divides,
    depth_to_space,
    space_to_depth,
)
from espalier.nn.orthogonal.spectrum.convolution import Taps, apply_spectrum, convolve, spectrum
from espalier.nn.precision import is_tracing, outside_graphs, takes_batches, upcast, without_autocast
from espalier.sizes import per_axis, whole_numbers

PADDING_MODES = ("circular", "zeros")

_PLAIN = {1: (F.conv1d, F.conv_transpose1d), 2: (F.conv2d, F.conv_transpose2d), 3: (F.conv3d, F.conv_transpose3d)}


# Pixels of an image, and numbers of a block of them, from which its own product is faster than a convolution.
_MANY, _WIDE = 128, 16


class _ByImage(torch.autograd.Function):
    """A matrix (C', C) times every image of (B, C, pixels), and a bias: one product an image."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        """See above."""
        ctx.save_for_backward(matrix, x)
        each = matrix.expand(len(x), -1, -1)
        return torch.bmm(each, x) if bias is None else torch.baddbmm(bias[:, None], each, x)

    @staticmethod
    @takes_batches
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of all three."""
        matrix, x = ctx.saved_tensors
        of_matrix, of_x, of_bias = ctx.needs_input_grad
        d_matrix = d_x = d_bias = None
        if of_matrix and is_tracing():
            d_matrix = torch.einsum("bop,bip->oi", grad, x)
        elif of_matrix:
            d_matrix = torch.zeros_like(matrix)
            for grad_OP, x_IP in zip(grad, x, strict=True):  # all at once would hold a matrix an image
                d_matrix.addmm_(grad_OP, x_IP.mT)
        if of_x:
            d_x = torch.bmm(matrix.mT.expand(len(x), -1, -1), grad)
        if of_bias:
            d_bias = grad.sum((0, 2))
        return d_matrix, d_x, d_bias


class _CayleyConv(OrthogonalLayer):
    """What the layers of this file share; ``dim`` spatial axes, and the adjoint if ``transposed``."""

    dim: int
    transposed = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding_mode: str = "circular",
        groups: int = 1,
        dilation: int | Sequence[int] = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        in_channels, out_channels, groups = whole_numbers(
            in_channels=in_channels, out_channels=out_channels, groups=groups
        )
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = per_axis("kernel_size", kernel_size, self.dim)
        self.stride = per_axis("stride", stride, self.dim)
        self.dilation = per_axis("dilation", dilation, self.dim)
        self.padding_mode = padding_mode
        if padding_mode not in PADDING_MODES:
            raise unknown_name("padding_mode", padding_mode, PADDING_MODES)
        if in_channels % groups or out_channels % groups:
            raise EspalierError(
                f"{in_channels} → {out_channels} channels do not fall into {groups} groups: make both multiples of it"
            )
        fine, coarse = (out_channels, in_channels) if self.transposed else (in_channels, out_channels)
        shape = coarse, math.prod(self.stride) * fine // groups, *self.kernel_size
        self._create(shape, out_channels if bias else 0, device, dtype, generator)

    @outside_graphs
    @without_autocast
    def forward(self, x: Tensor) -> Tensor:
        """Apply the operator to (B, C, *S) images of any size; see the class."""
        if x.ndim != self.dim + 2 or x.shape[1] != self.in_channels or 0 in x.shape[2:]:
            axes = ", ".join("DHW"[-self.dim :])
            raise EspalierError(f"input is {tuple(x.shape)}: give (B, {self.in_channels}, {axes}), no side of 0")
        dtype, weight = x.dtype, self.weight  # one look: a parametrised weight is made at each
        coarse, fine = weight.shape[0], weight.shape[1] * self.groups // math.prod(self.stride)
        x, weight, alpha, bias = upcast(x, weight, self.alpha, self._bias_of(fine if self.transposed else coarse))
        if math.prod(self.kernel_size) == 1:
            return self._pointwise(x, bias).to(dtype)
        if self.transposed:
            y = depth_to_space(self._isometry(x, weight, alpha, None), self.stride)
            return (y if bias is None else y + bias.view(-1, *[1] * self.dim)).to(dtype)
        return self._isometry(space_to_depth(x, self.stride), weight, alpha, bias).to(dtype)

    def _isometry(self, x: Tensor, weight: Tensor, alpha: Tensor, bias: Tensor | None) -> Tensor:
        """Apply the operator of stride 1 on the torus that the padding asks for."""
        margins = [(d * (k - 1) // 2, d * (k - 1)) for k, d in zip(self.kernel_size, self.dilation, strict=True)]
        size = x.shape[2:]
        if self.padding_mode == "zeros":
            pads = [(low, both - low) for low, both in margins]
            x = F.pad(x, [p for pair in reversed(pads) for p in pair])
        y = self._on_torus(channels_last(x), weight, alpha, bias)
        if self.padding_mode == "zeros":
            for axis, ((low, _), n) in enumerate(zip(margins, size, strict=True)):
                y = y.narrow(axis, low, n)
        return channels_first(y)

    def _on_torus(self, x: Tensor, weight: Tensor, alpha: Tensor, bias: Tensor | None) -> Tensor:
        if self.training:
            return convolve(x, self._taps(weight, alpha), bias)
        planes = self._operator(tuple(int(n) for n in x.shape[: self.dim]), x.dtype)
        return apply_spectrum(x, planes, self.groups, bias)

    def torus(self, size: Sequence[int]) -> tuple[int, ...]:
        """Return the size of the torus on which images of ``size`` are convolved: coarse pixels, with the padding."""
        coarse = tuple(size) if self.transposed else tuple(n // s for n, s in zip(size, self.stride, strict=True))
        if self.padding_mode == "circular":
            return coarse
        return tuple(n + d * (k - 1) for n, d, k in zip(coarse, self.dilation, self.kernel_size, strict=True))

    def operator(self, torus: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a copy of the spectrum that evaluation applies on a torus: planes of Qᵀ, (2, F·G, inputs, outputs)."""
        return self._operator(torus, dtype).clone()  # what the cache keeps must not be written to

    def _operator(self, torus: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        shaped_by = (torus, self.groups, self.dilation, self.transposed)
        return self._cache.get(
            shaped_by, (self.weight, self.alpha), lambda w, a: spectrum(self._taps(*upcast(w, a)), torus), dtype
        )

    def _taps(self, weight: Tensor, alpha: Tensor) -> Taps:
        return Taps.of(scaled(weight, alpha), self.groups, self.dilation, adjoint=self.transposed)

    def _pointwise(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Apply a kernel of one tap: the same matrix on every block of pixels."""
        q = orthogonal_matrix(self, self.groups, x.dtype)
        kernel = q.reshape(self.weight.shape[0], -1, *self.stride)
        if self.groups == 1 and not is_tracing() and channels_last(x).is_contiguous() and not self.transposed:
            # In the layout that the transforms keep, where a convolution would turn every image around.
            matrix = kernel.movedim(1, -1).flatten(1)
            return channels_first(F.linear(blocks_last(x, self.stride), matrix, bias))
        if self._gains_by_image(x):
            blocks = space_to_depth(x, self.stride)
            return _ByImage.apply(kernel.flatten(1), blocks.flatten(2), bias).unflatten(2, blocks.shape[2:])
        plain, adjoint = _PLAIN[self.dim]
        if self.transposed:
            return adjoint(x, kernel, bias, self.stride, groups=self.groups)
        check_divides(x.shape[2:], self.stride)
        return plain(x, kernel, bias, self.stride, groups=self.groups)

    def _gains_by_image(self, x: Tensor) -> bool:
        """Return whether a product for each image is faster than a convolution, which turns all of them around."""
        plain = not self.transposed and self.groups == 1 and x.device.type == "cpu" and x.is_contiguous()
        blocks_stay = set(self.stride) == {1} or (self.dim == 2 and len(set(self.stride)) == 1)
        large = math.prod(self.torus(x.shape[2:])) >= _MANY and self.weight.shape[1] >= _WIDE
        return plain and blocks_stay and large and not is_tracing()

    def extra_repr(self) -> str:
        """Show the shape in ``print(model)``."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding_mode={self.padding_mode!r}, groups={self.groups}, dilation={self.dilation}, "
            f"bias={self.bias is not None}"
        )


class CayleyConv1d(_CayleyConv):
    """``CayleyConv2d`` over one axis: (B, C, W) → (B, C', W/stride)."""

    dim = 1


class CayleyConv2d(_CayleyConv):
    """Orthogonal convolution: the Cayley transform of the kernel's spectrum, at every frequency of the image's torus.

    With Ŵ_f = Σ_t w_t e^(2πi⟨f, t⟩/n) the spectrum of the correlation with ``α·w/‖w‖``, ``ŷ_f = cayley(Ŵ_f) x̂_f + b``.
    If outputs = s²·inputs the layer is an isometry, if fewer it has orthonormal rows, if more orthonormal columns, so
    its Lipschitz constant is 1 with either padding. The operator's own kernel is as large as the image: ``kernel_size``
    counts the taps that parametrise it. It is rebuilt for every image size, and any size may come at any time.

    Stride s moves blocks of s × s pixels into channels (``F.pixel_unshuffle``) and convolves what results, so kernel
    taps and dilation count coarse pixels, and s must divide the image's size.

    Args:
        in_channels: channels C of the input.
        out_channels: channels C' of the output.
        kernel_size: taps along each axis, even ones too; the tap (k − 1)//2 lies on the output pixel. A kernel of one
            tap costs one Cayley transform of one matrix.
        stride: one number, or one per axis.
        padding_mode: ``"circular"``, or ``"zeros"``: pad by the kernel's reach, convolve on the larger torus, crop.
            That is an isometry followed by a contraction: still 1-Lipschitz, no longer orthogonal.
        groups: independent operators on equal shares of the channels.
        dilation: distance of neighbouring taps.
        bias: add a learned number per output channel.
        device: of the parameters.
        dtype: of the parameters. Half-precision ones, and any autocast, still compute in float32.
        generator: source of the initial weights.

    Parameters: ``weight`` (C', s²·C/groups, *k) and ``bias`` uniform on ±1/√fan-in, and the scale ``alpha`` (1,),
    ‖weight‖ at the start. The norm is the kernel's own, so weights mean the same at every image size.

    Training solves with the batch and never forms the operator. Evaluation forms it once in float64, rounds it and
    keeps it for the last four image sizes, while the parameters keep their contents.

    Shapes: (B, C, H, W) → (B, C', H/s, W/s).

    Raises:
        EspalierError: sizes that are not whole numbers from 1, channels that do not fall into groups, an unknown
            padding mode, a dtype that is not floating-point; on the input, a wrong shape, a size that the stride does
            not divide, or integers or complex numbers.

    Source: arXiv 2104.07167, with the differences that the guide lists.
    """

    dim = 2


class CayleyConv3d(_CayleyConv):
    """``CayleyConv2d`` over three axes: (B, C, D, H, W) → (B, C', D/s, H/s, W/s)."""

    dim = 3


class CayleyConvTranspose2d(_CayleyConv):
    """The adjoint of ``CayleyConv2d(out_channels, in_channels, …)`` with the same weight and α: ⟨Ax, y⟩ = ⟨x, Aᵀy⟩.

    Arguments and parameters are those of that layer with the roles of the channels exchanged: ``weight`` is
    (in_channels, s²·out_channels/groups, *k). Stride s makes images s times larger. If the convolution is square, its
    adjoint is its inverse.

    Shapes: (B, C, H, W) → (B, C', s·H, s·W).
    """

    dim = 2
    transposed = True
