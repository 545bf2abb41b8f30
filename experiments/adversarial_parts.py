"""Parts of the networks of ``adversarial_models.py``: activations, plain operations, what changes between calls."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espalier import nn as enn

ACTIVATIONS: tuple[Callable[[bool], nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.SiLU, nn.Mish, nn.SELU, lambda inplace: nn.Hardtanh(-1.0, 0.7, inplace),
    lambda inplace: nn.ELU(1.3, inplace), lambda inplace: nn.LeakyReLU(3.0, inplace),
    lambda inplace: nn.LeakyReLU(-0.5, inplace), lambda inplace: nn.GELU(), lambda inplace: nn.Tanh(),
    lambda inplace: nn.Sigmoid(), lambda inplace: nn.Softsign(), lambda inplace: nn.Softshrink(0.1),
    lambda inplace: nn.LogSigmoid(), lambda inplace: nn.Tanhshrink(), lambda inplace: nn.PReLU(1, -2.0),
    lambda inplace: enn.Abs(),
)  # fmt: skip


class Function(nn.Module):
    """A forward pass of plain operations around some modules."""

    def __init__(self, name: str, function: Callable[..., Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.name, self.function, self.parts = name, function, nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the function makes of x and the parts."""
        return self.function(x, *self.parts)

    def extra_repr(self) -> str:
        """Show which one."""
        return self.name


def _mutate(x: Tensor) -> Tensor:
    y = x * 1.0
    z = y
    y.mul_(2.0).add_(0.25)
    return z + x


def _halves(x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    return torch.cat((torch.maximum(a, b), torch.minimum(a, b)), 1)


def _in_a_row(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Return what becomes of the numbers of an image as one channel of (B, 1, L)."""
    y = function(x.flatten(1).unsqueeze(1)).flatten(1)
    return y if x.ndim == 2 else y[:, :, None, None]


def _in_a_cube(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Return what becomes of (B, C, H, W) as one channel of (B, 1, C, H, W)."""
    return function(x.unsqueeze(1)).squeeze(1)


def _taps(x: Tensor, *sides: int) -> Tensor:
    """Return a kernel with one channel in and out."""
    size = torch.Size(sides).numel()
    return torch.linspace(-1, 2, size, dtype=x.dtype).view(1, 1, *sides)


def _asked(x: Tensor) -> Tensor:
    """Return x after everything was asked that may be asked about it."""
    for name in ("dtype", "device", "layout", "is_cuda", "is_sparse", "is_quantized", "is_meta", "is_mkldnn",
                 "is_nested", "is_mps", "is_xpu", "itemsize", "ndim", "requires_grad",
                 "is_leaf"):  # fmt: skip
        getattr(x, name)
    scale = x.dim() + x.get_device() + x.element_size() + x.is_contiguous()
    return scale * x if x.is_floating_point() and not x.is_complex() else x


MOVES: dict[str, Callable[..., Tensor]] = {
    "permuted": lambda x: x.permute(0, *range(x.ndim - 1, 0, -1)),
    "swapped": lambda x: x.swapaxes(1, -1).clone().swapdims(1, -1) - x,
    "moved": lambda x: x.movedim(1, -1).contiguous().moveaxis(-1, 1) + x.flip(1),
    "squeezed": lambda x: x.unsqueeze(1).squeeze(1) * 0.7,
    "unflattened": lambda x: x.flatten(1).unflatten(1, x.shape[1:]) + x,
    "unbound": lambda x: torch.stack(x.unbind(1)[::-1], 1) + x,
    "narrowed": lambda x: x.narrow(1, 0, max(1, x.shape[1] - 1)),
    "selected": lambda x: x.select(1, -1).unsqueeze(1) + x,
    "split": lambda x: torch.cat(x.split(1, 1)[::-1], 1) - x,
    "on its side": lambda x: x.mT.contiguous(),
    "picked": lambda x: x.index_select(1, torch.tensor([0, x.shape[1] - 1, 0])),
    "sliced": lambda x: x[:, ::2] if x.ndim == 2 else x[..., ::2, 1:],
    "repeated": lambda x: x.repeat(1, 2, *[1] * (x.ndim - 2)),
    "tiled": lambda x: x.tile(1, 3, *[1] * (x.ndim - 2)),
    "shuffled": lambda x: F.channel_shuffle(x, 2) + x,
    "pixels out": lambda x: F.pixel_unshuffle(x, 2),
    "pixels in": lambda x: F.pixel_shuffle(x, 2),
    "cut and padded": lambda x: F.pad(x, (-1, 2), value=0.3) if x.ndim == 2 else F.pad(x, (-1, 2, 1, -1), value=0.3),
    "wrapped around": lambda x: F.pad(x, (2, 1, 0, 1), "circular"),
}
"""Of values (B, C, …): numbers in other places."""

FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "x + x": lambda x: x + x,
    "grey minus three means": lambda x: (
        x[:, :1] - torch.tensor([0.1, 0.2, 0.3], dtype=x.dtype).view(3, *[1] * (x.ndim - 2))
    ),
    "times constants": lambda x: x * torch.linspace(-2, 2, x.shape[1], dtype=x.dtype).view(-1, *[1] * (x.ndim - 2)),
    "divided": lambda x: x / 0.3,
    "in place": _mutate,
    "halves": _halves,
    "sorted": lambda x: x.sort(dim=1).values,
    "rolled": lambda x: x.roll(1, -1) - x.flip(-1),
    "absolute": lambda x: x.abs().clamp(max=0.8),
    "twice beside itself": lambda x: torch.cat((x, 2 * x), 1),
    "minus its mean": lambda x: x - x.mean(1, keepdim=True),
    "sum of channels": lambda x: x.sum(1, keepdim=True).expand(x.shape),
    "transposed": lambda x: x.transpose(1, -1).contiguous().view(x.shape),
    "float32 and back": lambda x: x.float().to(x.dtype) + 0.5,
    "one less": lambda x: 1 - x.neg().relu(),
    "stacked": lambda x: torch.stack((x, x), 1).amax(1),
    "by the number of images": lambda x: x * len(x) / 2,
    "by it above one": lambda x: x + x.shape[0] * (x - 1).relu(),
    "a constant an image": lambda x: x - x.new_full((x.shape[0], *[1] * (x.ndim - 1)), 0.3),
    "beside constants": lambda x: torch.cat((torch.ones(x.shape, dtype=x.dtype), x), 1)[:, 1 : x.shape[1] + 1],
    "by its total": lambda x: x + x.numel() / 64 * (x - 1).relu(),
    "by its bytes": lambda x: x + x.nbytes / 64 * (x - 1).relu(),
    "less its smallest": lambda x: x - x.amin(1, keepdim=True),
    "clamped": lambda x: x.clamp_min(0.2).clamp_max(0.9) + torch.maximum(x, x.new_tensor([0.4])),
    "below constants": lambda x: torch.minimum(x, torch.linspace(0, 1, x.shape[-1], dtype=x.dtype)),
    "hard": lambda x: F.hardsigmoid(3 * x) + F.hardswish(x - 2) - F.relu6(7 * x),
    "waves": lambda x: (3 * x).sin() + 0.5 * x.cos() - x.atan(),
    "undropped": lambda x: F.alpha_dropout(x, 0.5, False) + F.feature_alpha_dropout(x, 0.5, False),
    "times a matrix": lambda x: x @ torch.linspace(-1, 1, x.shape[-1] ** 2, dtype=x.dtype).view(x.shape[-1], -1),
    "slopes": lambda x: F.prelu(x - 0.5, torch.linspace(-2, 3, x.shape[1], dtype=x.dtype)),
    "divided by constants": lambda x: x / torch.linspace(0.4, 3, x.shape[-1], dtype=x.dtype),
    "with weights": lambda x: torch.sub(x, x.abs(), alpha=1.5) + torch.rsub(x, 2.0),
    "beside its likes": lambda x: (
        x * torch.ones_like(x) - torch.zeros_like(x) + x.new_ones(x.shape) - x.new_zeros(x.shape)
    ),
    "in fewer digits": lambda x: x.half().to(x.dtype) + x.bfloat16().type_as(x) - x.double().to(x.dtype),
    "asked": _asked,
    "as it is": lambda x: x.detach() * 0.6,
    "row convolved": lambda x: _in_a_row(x, lambda y: F.conv1d(y, _taps(y, 3), padding=1)),
    "row spread": lambda x: _in_a_row(x, lambda y: F.conv_transpose1d(y, _taps(y, 2), stride=2)),
    "row averaged": lambda x: _in_a_row(x, lambda y: F.avg_pool1d(y, 3, 1)),
    "row's peaks": lambda x: _in_a_row(x, lambda y: F.max_pool1d(y, 2, 1)),
    "row's mean": lambda x: _in_a_row(x, lambda y: F.adaptive_avg_pool1d(y, 1) - y),
    "row's peak": lambda x: _in_a_row(x, lambda y: F.adaptive_max_pool1d(y, 1) + y),
    "mean pixel": lambda x: F.adaptive_avg_pool2d(x, 1) + x,
    "peak pixel": lambda x: F.adaptive_max_pool2d(x, 1) - x,
    "cube convolved": lambda x: _in_a_cube(x, lambda y: F.conv3d(y, _taps(y, 1, 2, 3), padding=(0, 1, 0))),
    "cube spread": lambda x: _in_a_cube(x, lambda y: F.conv_transpose3d(y, _taps(y, 1, 2, 1), stride=(1, 2, 1))),
    "cube averaged": lambda x: _in_a_cube(x, lambda y: F.avg_pool3d(y, (1, 2, 2), 1)),
    "cube's peaks": lambda x: _in_a_cube(x, lambda y: F.max_pool3d(y, (1, 2, 1), 1)),
    "cube's mean": lambda x: _in_a_cube(x, lambda y: F.adaptive_avg_pool3d(y, 1) + y),
    "cube's peak": lambda x: _in_a_cube(x, lambda y: F.adaptive_max_pool3d(y, 1) + y),
    **MOVES,
    "by shape": lambda x: x.reshape(x.shape[0], -1).view(x.shape) * torch.full_like(x, -1.5),
}
"""Of values (B, C, …), which keep the number of dimensions."""

INNER: dict[str, Callable[..., Tensor]] = {
    "residual": lambda x, f: x + f(x),
    "weighted": lambda x, f: 0.3 * x - 1.5 * f(x),
    "twice": lambda x, f: f(f(x)),
    "beside": lambda x, f: torch.cat((x, f(x)), 1),
    "lerp": lambda x, f: torch.lerp(x, f(x), 0.7),
    "same twice": lambda x, f: f(x) + f(x),
    "larger": lambda x, f: torch.maximum(x, f(x)),
    "in place sum": lambda x, f: f(x).add_(x),
}
"""With a part that keeps the shape."""


class Changing(nn.Module):
    """Another map at every call, where a number is above one."""

    KINDS = ("counts", "draws", "keeps images", "moves a weight", "sets a layer")

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.calls, self.kept, self.rng = kind, 0, 0.0, random.Random(0)
        self.register_buffer("scale", torch.ones(1))
        self.layer = enn.CayleyConv1d(1, 1, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return x and something of what it is above one."""
        self.calls += 1
        far = (x - 1).relu()
        if self.kind == "counts":
            far = self.calls * far
        elif self.kind == "draws":
            far = 4 * self.rng.random() * far
        elif self.kind == "keeps images":
            far, self.kept = far + self.kept, far[:1]
        elif self.kind == "moves a weight":
            self.scale += 1
            far = self.scale.to(x) * far
        else:
            self.layer.padding_mode = "zeros" if self.calls % 2 else "circular"
            far = self.layer(far.flatten(1).unsqueeze(1)).view(x.shape)
        return x + far

    def extra_repr(self) -> str:
        """Show which one."""
        return self.kind


class Asking(nn.Module):
    """Another map for users than while it is bounded, where a number is above one."""

    QUESTIONS: ClassVar[dict[str, Callable[[Tensor], bool]]] = {
        "its type": lambda x: type(x) is Tensor,
        "whether the number of images is one": lambda x: isinstance(x.shape[0], int),
        "the text of its shape": lambda x: "N" not in str(x.shape),
        "whether two names are one tensor": lambda x: x.contiguous() is x,
        "whether it has another attribute": lambda x: not hasattr(x, "bound"),
        "whether gradients are on": lambda x: torch.is_grad_enabled(),
        "whether it wants one": lambda x: x.requires_grad,
        "whether a part of it lies in one piece": lambda x: x.flatten(1)[:, :2].T.is_contiguous(),
        "how it lies in memory": lambda x: x.stride(-1) > x.stride(0),
        "what made it": lambda x: "Mul" in str(x.grad_fn),
    }

    def __init__(self, question: str) -> None:
        super().__init__()
        self.question = question

    def forward(self, x: Tensor) -> Tensor:
        """Return x and something of what it is above one."""
        return x + (50 if self.QUESTIONS[self.question](x) else 1) * (x - 1).relu()

    def extra_repr(self) -> str:
        """Show which one."""
        return self.question
