"""Normalisation as layers whose constant is known: of the input per channel, and of a last layer's rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.errors import EspalierError
from espalier.nn.lipschitz.constant import spectral_norm
from espalier.nn.lipschitz.inputs import check_floating, check_width
from espalier.nn.precision import upcast
from espalier.sizes import whole_number, whole_numbers


class Normalize(nn.Module):
    """Subtract a mean per channel and divide by a standard deviation per channel: (x − mean) / std.

    Its Lipschitz constant is 1 / min(std): 4.11 for CIFAR-10's usual statistics, which is why a robust net had better
    leave ``std`` at 1 (``Normalize(mean)``), and why the division belongs inside the model that is certified.

    Args:
        mean: one value per channel, or one value for all of them, in [0, 1] pixel units.
        std: likewise, positive; 1 by default (centring alone).

    Shapes: (B, C, H, W) → (B, C, H, W).

    Raises:
        EspalierError: if the lengths differ, or a standard deviation is not positive and finite; on the input, other
            channels than the statistics have, or integers or complex numbers.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float] | float, std: Sequence[float] | float = 1.0) -> None:
        super().__init__()
        # Checked on the CPU: a default device such as meta has no numbers to check.
        dtype = torch.get_default_dtype()
        mean_C = torch.atleast_1d(torch.as_tensor(mean, dtype=dtype, device="cpu"))
        std_C = torch.atleast_1d(torch.as_tensor(std, dtype=dtype, device="cpu"))
        if mean_C.ndim != 1 or std_C.ndim != 1 or (1 not in (len(mean_C), len(std_C)) and len(mean_C) != len(std_C)):
            raise EspalierError(f"mean={mean!r} and std={std!r} differ in length: give one value per channel in each")
        if not (torch.isfinite(std_C).all() and (std_C > 0).all() and torch.isfinite(mean_C).all()):
            raise EspalierError(f"std={std!r}, mean={mean!r}: give finite values and positive deviations")
        self._given = mean_C.tolist(), std_C.tolist()
        device = torch.get_default_device()
        self.register_buffer("mean", mean_C.view(-1, 1, 1).to(device))
        self.register_buffer("std", std_C.view(-1, 1, 1).to(device))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set the statistics to those given at construction; nothing is drawn."""
        for statistic, values in zip((self.mean, self.std), self._given, strict=True):
            statistic.copy_(torch.tensor(values, dtype=statistic.dtype, device="cpu").view(-1, 1, 1))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Normalize:
        was_meta = self.mean.is_meta
        super()._apply(fn, recurse)
        if was_meta and not self.mean.is_meta:  # ``to_empty`` leaves whatever was in memory
            self.reset_parameters()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Return (x − mean) / std, computed in float32 or better, in the dtype of x."""
        channels = max(len(self.mean), len(self.std))
        if channels > 1 and (x.ndim < 3 or x.shape[-3] != channels):
            raise EspalierError(
                f"input is {tuple(x.shape)}, statistics have {channels} channels: give (B, {channels}, H, W)"
            )
        wide, mean, std = upcast(x, self.mean, self.std)
        return ((wide - mean) / std).to(x.dtype)

    def lipschitz_constant(self) -> float:
        """Return 1 / min(std), the ℓ2 Lipschitz constant; infinite for statistics that are not one a channel."""
        if any(statistic.shape[1:] != (1, 1) for statistic in (self.mean, self.std)):
            return float("inf")  # they would be broadcast, and numbers copied
        return float(1.0 / self.std.double().min())

    def extra_repr(self) -> str:
        """Show the statistics in ``print(model)``."""
        statistics = self._given if self.mean.is_meta else [s.flatten().tolist() for s in (self.mean, self.std)]
        return f"mean={statistics[0]}, std={statistics[1]}"


class BatchCentering(nn.Module):
    """Subtract the mean of every channel: of the batch in training, its running mean in evaluation.

    What batch norm does without its division, so that in evaluation it is a translation: its constant is 1. As there,
    an empty batch leaves the running mean as it is.

    Args:
        channels: C.
        momentum: share of the present batch in the running mean.

    Shapes: (B, C, …) → (B, C, …).

    Raises:
        EspalierError: channels that are no whole number from 1; on the input, another number of them, or integers or
            complex numbers.

    Source: Salimans & Kingma, arXiv 1602.07868 (mean-only batch normalisation).
    """

    running_mean: Tensor

    def __init__(self, channels: int, momentum: float = 0.1) -> None:
        super().__init__()
        self.channels, self.momentum = whole_number("channels", channels), momentum
        self.register_buffer("running_mean", torch.zeros(self.channels))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set the running mean to 0; nothing is drawn."""
        self.running_mean.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Return x minus the mean, computed in float32 or better, in the dtype of x."""
        check_width(x, 1, self.channels, f"(B, {self.channels}, …)")
        wide, mean = upcast(x, self.running_mean)
        if self.training:
            mean = wide.mean([axis for axis in range(x.ndim) if axis != 1])
            if x.numel():
                # Not under ``no_grad``: a graph with a switch inside is exported to a file that cannot be loaded.
                self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), self.momentum)
        return (wide - mean.view(-1, *[1] * (x.ndim - 2))).to(x.dtype)

    def extra_repr(self) -> str:
        """Show the channels in ``print(model)``."""
        return f"{self.channels}, momentum={self.momentum}"


class NormalizedLinear(nn.Module):
    """Linear layer whose rows are used at unit norm: W_i/‖W_i‖·x + b, for the last layer of a Lipschitz net.

    Every score is then 1-Lipschitz in the features, though the vector of scores is not: a certificate must use the
    pairwise distances ‖w_y − w_j‖ ≤ 2, which ``espalier.certify`` does. It is no ``nn.Linear``: tools that fold a batch
    norm or an adapter into the weight of one, or quantise it, would change another function than this.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        bias: add a learned vector.
        device: of the parameters.
        dtype: of the parameters.

    Shapes: (…, in_features) → (…, out_features).

    Raises:
        EspalierError: a width that is no whole number from 1; on the input, another width, or integers or complex
            numbers.

    Source: Singla, Singla & Feizi, arXiv 2108.04062, section 4 (last-layer normalisation).
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_features, out_features = whole_numbers(in_features=in_features, out_features=out_features)
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores."""
        check_width(x, -1, self.in_features, f"(…, {self.in_features})")
        check_floating(x)
        return F.linear(x, self.classifier_weight(), self.bias)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw weights and bias uniformly from ±1/√in_features, torch's default."""
        bound = self.in_features**-0.5
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound, generator=generator)

    def classifier_weight(self) -> Tensor:
        """Return the matrix that is applied: the rows of ``weight`` at unit norm."""
        return F.normalize(self.weight, dim=1)

    def lipschitz_constant(self) -> float:
        """Return the spectral norm of the normalised matrix."""
        return spectral_norm(F.normalize(self.weight.detach().double(), dim=1))

    def extra_repr(self) -> str:
        """Show the shape in ``print(model)``."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"
