"""One pass over a tensor: everything that the static checks want to know of its numbers."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from espalier.contents import bytes_in

# Numbers read per step: a mebibyte of float32 stays in the processor's cache through all the reductions.
_CHUNK = 1 << 18
_SAMPLE = 1 << 16
# Below, no start and no training of a weight goes (but decayed, dead units do); above, neither.
TINY = 1e-30
HUGE = 1e10


@dataclass(frozen=True)
class TensorStats:
    """Numbers of one tensor.

    Attributes:
        numel: how many entries.
        nonfinite: how many are NaN or infinite; what follows is of the others.
        minimum, maximum, mean, rms: of the finite entries.
        sampled: entries of an evenly spaced sample (all of a tensor up to 65,536), of which:
        zeros: how many are zero.
        tiny: how many are not zero and of magnitude under 1e-30.
        distinct: how many different values there are.
        at_minimum, at_maximum: how many sit at the extremes of the whole tensor.
        correlation: of neighbours in memory, in [−1, 1]; near 0 for noise.
        fingerprint: equal for equal bits; of the sample and the sums.
    """

    numel: int
    nonfinite: int
    minimum: float
    maximum: float
    mean: float
    rms: float
    sampled: int
    zeros: int
    tiny: int
    distinct: int
    at_minimum: int
    at_maximum: int
    correlation: float
    fingerprint: str

    @property
    def std(self) -> float:
        """Standard deviation of the finite entries."""
        return self.rms * math.sqrt(max(1 - (self.mean / self.rms) ** 2, 0.0)) if self.rms else 0.0

    @property
    def magnitude(self) -> float:
        """Largest magnitude."""
        return max(abs(self.minimum), abs(self.maximum))

    @property
    def constant(self) -> bool:
        """Whether every entry is the same finite number."""
        return not self.nonfinite and self.minimum == self.maximum

    @property
    def closed(self) -> bool:
        """Whether every entry is zero."""
        return self.constant and self.minimum == 0

    @property
    def noise(self) -> bool:
        """Whether the entries look drawn at random: many values, in no order."""
        enough = self.distinct > max(8, 0.1 * min(self.sampled, 2048))
        return self.numel >= 16 and enough and abs(self.correlation) < 0.5


def dense(tensor: Tensor) -> bool:
    """Return whether a tensor has a norm and can be reshaped: sparse and nested ones cannot, nor those inside vmap."""
    inside = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return tensor.layout == torch.strided and not tensor.is_nested and not inside


def root_mean_square(tensor: Tensor) -> float:
    """Return the root of the mean square of a tensor's entries, of which there is at least one, summed in float64."""
    values = tensor.detach().coalesce().values() if tensor.is_sparse else tensor.detach()
    dtype = torch.complex128 if tensor.is_complex() else torch.float64
    return float(torch.linalg.vector_norm(values, dtype=dtype)) / math.sqrt(tensor.numel())


@torch.no_grad()
def measure(values: Tensor) -> TensorStats:
    """Read a floating tensor once, in pieces that fit the processor's cache, and look closer at a sample.

    Args:
        values: a tensor with storage and at least one entry, of any floating dtype, on any device.
    """
    flat = values.detach().reshape(-1)
    chunk = _CHUNK if flat.device.type == "cpu" else 1 << 25
    total = squares = 0.0
    nonfinite = 0
    minimum, maximum = math.inf, -math.inf
    for piece in flat.split(chunk):
        piece = piece if piece.dtype in (torch.float32, torch.float64) else piece.float()
        low, high = (float(value) for value in torch.aminmax(piece))
        if not (math.isfinite(low) and math.isfinite(high)):
            finite = piece[torch.isfinite(piece)]
            nonfinite += piece.numel() - finite.numel()
            if not finite.numel():
                continue
            piece = finite
            low, high = (float(value) for value in torch.aminmax(piece))
        minimum, maximum = min(minimum, low), max(maximum, high)
        # Squares of 1e20 overflow float32.
        summed = piece.double() if max(-low, high) > 1e15 else piece
        total += float(summed.sum())
        squares += float(torch.dot(summed, summed))
    finite_count = max(flat.numel() - nonfinite, 1)
    if minimum > maximum:
        minimum = maximum = math.nan
    rms = math.sqrt(squares / finite_count)
    if (not rms or math.isinf(rms)) and (size := max(abs(minimum), abs(maximum))) > 0:
        # The squares of 1e200 and of 1e-200 are no numbers: once more, in shares of the largest.
        shares = (piece.double().nan_to_num(0.0, 0.0, 0.0) / size for piece in flat.split(chunk))
        rms = size * math.sqrt(sum(float(torch.dot(share, share)) for share in shares) / finite_count)
    sample, distinct, correlation = _sample(flat)
    digest = hashlib.blake2b(b"".join(bytes_in(sample)), digest_size=8)
    digest.update(repr((tuple(values.shape), total, squares, minimum, maximum)).encode())
    numbers = sample if sample.dtype == torch.float64 else sample.float()
    zeros = int((numbers == 0).sum())
    return TensorStats(
        flat.numel(),
        nonfinite,
        minimum,
        maximum,
        total / finite_count,
        rms,
        sampled=sample.numel(),
        zeros=zeros,
        tiny=int((numbers.abs() < TINY).sum()) - zeros,
        distinct=distinct,
        at_minimum=int((numbers == minimum).sum()),
        at_maximum=int((numbers == maximum).sum()),
        correlation=correlation,
        fingerprint=digest.hexdigest(),
    )


def _sample(flat: Tensor) -> tuple[Tensor, int, float]:
    """Return evenly spaced entries on the CPU, how many distinct values they have, and the neighbours' correlation."""
    step = -(-flat.numel() // _SAMPLE)
    sample = flat[::step].cpu()
    run = flat[: _SAMPLE // 8].cpu().double()
    run = run[torch.isfinite(run)]
    centred = run - run.mean() if run.numel() else run
    power = float(centred.square().sum())
    correlation = float(torch.dot(centred[:-1], centred[1:])) / power if 0 < power < math.inf else 0.0
    return sample, int(torch.unique(sample.float()).numel()), correlation
