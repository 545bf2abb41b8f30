"""Which memory layout a convolutional network trains fastest in: measured on the machine, then chosen and said."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from espalier.errors import EspalierError

_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class MemoryFormatChoice:
    """What was measured and what was chosen; prints as one line.

    Attributes:
        seconds: median seconds of one training step, by the layout's name.
    """

    seconds: dict[str, float]

    @property
    def name(self) -> str:
        """The faster layout's name."""
        return min(self.seconds, key=self.seconds.__getitem__)

    @property
    def memory_format(self) -> torch.memory_format:
        """The faster layout, as ``Tensor.to(memory_format=…)`` takes it."""
        return _FORMATS[self.name]

    def __str__(self) -> str:
        others = ", ".join(f"{taken * 1e3:.1f} ms {name}" for name, taken in self.seconds.items())
        return f"memory format {self.name}: a training step takes {others}"


def choose_memory_format_(model: nn.Module, x_BCHW: Tensor, *, rounds: int = 3) -> MemoryFormatChoice:
    """Time one forward and backward pass in each memory layout and put the model into the faster one, in place.

    Which one wins flips with the kernel, the width, the machine and the precision, so no rule is built in. Gradients,
    norms' running statistics, the random stream and the training mode are left as they were.

    Args:
        model: a network of images; parameters keep their identity, so that an optimiser built before stays valid.
        x_BCHW: a batch of the size that will be trained on, on the model's device.
        rounds: timed steps of each layout, taken in turns after one that warms up.

    Returns:
        The choice; give the images the same layout: ``x.contiguous(memory_format=choice.memory_format)``.

    Raises:
        EspalierError: no round, or a batch that is not (B, C, H, W).
    """
    if rounds < 1:
        raise EspalierError(f"rounds is {rounds}: give at least 1")
    if x_BCHW.ndim != 4:
        raise EspalierError(f"x has shape {tuple(x_BCHW.shape)}: give a batch of images (B, C, H, W)")
    times: dict[str, list[float]] = {name: [] for name in _FORMATS}
    gradients = [parameter.grad for parameter in model.parameters()]
    buffers = [buffer.clone() for buffer in model.buffers()]
    devices = [x_BCHW.device] if x_BCHW.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        for turn in range(rounds + 1):
            for name, memory_format in _FORMATS.items():
                model.to(memory_format=memory_format)  # type: ignore[call-overload]
                taken = _step(model, x_BCHW.contiguous(memory_format=memory_format))
                if turn:
                    times[name].append(taken)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient
    with torch.no_grad():
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)
    choice = MemoryFormatChoice({name: statistics.median(taken) for name, taken in times.items()})
    model.to(memory_format=choice.memory_format)  # type: ignore[call-overload]
    return choice


def _step(model: nn.Module, x_BCHW: Tensor) -> float:
    for parameter in model.parameters():
        parameter.grad = None
    _wait(x_BCHW.device)
    start = time.perf_counter()
    model(x_BCHW).float().square().mean().backward()
    _wait(x_BCHW.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
