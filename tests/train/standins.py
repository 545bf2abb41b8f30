"""Small data and nets for the loop's tests: every kind of target, and a net with a norm, dropout and a tied weight."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from espalier import nn as enn
from espalier.models import VisionTransformer
from espalier.models.lipschitz import LipschitzNet
from espalier.randomness import derive_generator
from espalier.recipes.base import Recipe

CLASSES = 4


@dataclass
class BlobSource:
    """Images of noise around a class's pattern; ``kill_at`` = (epoch, step) ends the process there, unasked.

    ``signal_at`` = (epoch, step, number) sends a signal to this process; ``poison_at`` makes a batch not finite.
    """

    soft: bool = False
    kill_at: tuple[int, int] | None = None
    interrupt_at: tuple[int, int] | None = None
    poison_at: tuple[int, int] | None = None
    signal_at: tuple[int, int, int] | None = None
    examples: int = 40
    last: int | None = None  # examples of an epoch's last batch

    model_args: Mapping[str, Any] = None  # type: ignore[assignment]
    eval_splits: tuple[str, ...] = ("test", "far")

    def __post_init__(self) -> None:
        self.model_args = {"num_classes": CLASSES}
        self.patterns = 2 * torch.randn(CLASSES, 3, 1, 1, generator=derive_generator(7, "patterns")).expand(
            -1, -1, 6, 6
        )

    def to(self, device: torch.device | str) -> Self:
        self.patterns = self.patterns.to(device)
        return self

    def steps_per_epoch(self, batch_size: int) -> int:
        return self.examples // batch_size

    def train_batch(self, seed: int, epoch: int, step: int, batch_size: int) -> tuple[Tensor, Tensor]:
        if (epoch, step) == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if (epoch, step) == self.interrupt_at:
            self.interrupt_at = None
            raise KeyboardInterrupt
        if self.signal_at is not None and (epoch, step) == self.signal_at[:2]:
            os.kill(os.getpid(), self.signal_at[2])
        generator = derive_generator(seed, "batch", epoch, step)
        if self.last is not None and step + 1 == self.steps_per_epoch(batch_size):
            batch_size = self.last
        labels = torch.randint(CLASSES, (batch_size,), generator=generator)
        images = self.patterns[labels] + torch.randn(batch_size, 3, 6, 6, generator=generator)
        if (epoch, step) == self.poison_at:
            images = images * float("nan")
        if not self.soft:
            return images, labels
        other = labels.roll(1)
        eye = torch.eye(CLASSES)
        return 0.7 * images + 0.3 * images.roll(1, 0), 0.7 * eye[labels] + 0.3 * eye[other]

    def eval_batches(self, split: str, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = derive_generator(0, split)
        labels = torch.randint(CLASSES, (21,), generator=generator)
        noise = {"test": 1.0, "far": 4.0}[split]
        images = self.patterns[labels] + noise * torch.randn(21, 3, 6, 6, generator=generator)
        for start in range(0, 21, batch_size):
            yield images[start : start + batch_size], labels[start : start + batch_size]


class EchoSource:
    """Strings of tokens to be repeated; the first half of every string carries no loss, lengths differ."""

    model_args: Mapping[str, Any] = {"vocab_size": 5}
    eval_splits = ("test",)

    def to(self, device: torch.device | str) -> Self:
        return self

    def steps_per_epoch(self, batch_size: int) -> int:
        return 3

    signal_at: tuple[int, int, int] | None = None

    def train_batch(self, seed: int, epoch: int, step: int, batch_size: int) -> tuple[Tensor, Tensor]:
        if self.signal_at is not None and (epoch, step) == self.signal_at[:2]:
            os.kill(os.getpid(), self.signal_at[2])
        generator = derive_generator(seed, "echo", epoch, step)
        tokens = torch.randint(5, (batch_size, 6), generator=generator)
        hidden = torch.randint(0, 5, (batch_size, 1), generator=generator)
        targets = tokens.masked_fill(torch.arange(6) < hidden, -100)
        return tokens, targets

    def eval_batches(self, split: str, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield self.train_batch(0, 0, 0, 8)


class TinyNet(nn.Module):
    """Convolution, depthwise convolution, batch norm, dropout, linear."""

    def __init__(self, num_classes: int, dropout: float = 0.2, norm: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, num_classes)

    def no_weight_decay(self) -> set[str]:
        return {"norm.weight", "norm.bias"}

    def forward(self, images: Tensor) -> Tensor:
        features = self.norm(torch.relu(self.depthwise(torch.relu(self.stem(images)))))
        return self.head(self.dropout(features).mean((2, 3)))


class TiedNet(nn.Module):
    """Embedding and output layer share one weight."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, 8)
        self.middle = nn.Linear(8, 8)
        self.head = nn.Linear(8, vocab_size, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.middle(self.embed(tokens))))


class BlockNet(nn.Module):
    """Blocks in a list, as FSDP2 shards them, of widths that no number of processes divides."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(108, 7), nn.GELU(), nn.Linear(7, 108)) for _ in range(2))
        self.head = nn.Linear(108, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        features = images.flatten(1)
        for block in self.blocks:
            features = features + block(features)
        return self.head(features)


class IdleNet(BlockNet):
    """A net with a layer that nobody calls."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.idle = nn.Linear(3, 3)


def orthogonal_net(num_classes: int) -> LipschitzNet:
    """Return a net with every part that has a parameter of one number."""
    features = [
        *(enn.CayleyConv2d(3, 8, 3), enn.MaxMin(), enn.ConvexSum(enn.LinearResidual(8)), nn.Flatten()),
        *(enn.CayleyLinear(288, 10), enn.Householder(10)),
    ]
    return LipschitzNet(features, 10, num_classes, "orthogonal")


def build_model(name: str, **model_args: Any) -> nn.Module:
    known: dict[str, Callable[..., nn.Module]] = {
        "tiny": TinyNet,
        "tied": TiedNet,
        "blocks": BlockNet,
        "idle": IdleNet,
        "vit": VisionTransformer,
        "orthogonal": orthogonal_net,
    }
    return known[name](**model_args)


def recipe(**changes: Any) -> Recipe:
    """Return a run of four epochs of five steps on blobs."""
    values: dict[str, Any] = {"name": "blobs", "model": "tiny", "batch_size": 8, "epochs": 4, "lr": 0.02, "threads": 1}
    return Recipe(**{**values, **changes})


def build_source(recipe: Recipe) -> Any:
    return EchoSource() if recipe.dataset == "echo" else BlobSource(**recipe.data_args)
