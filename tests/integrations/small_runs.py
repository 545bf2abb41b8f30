"""Small models and data for trainers: a hybrid of attention and a state-space layer, and a ViT of transformers'."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from espalier.models import SequenceModel, VisionTransformer
from espalier.nn import Mamba2

CLASSES = 10


def vit(seed: int = 0, depth: int = 2) -> VisionTransformer:
    """Return a small ViT; its draws come from torch's global generator, put back afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return VisionTransformer(
            img_size=8, patch_size=2, in_chans=1, embed_dim=32, depth=depth, num_heads=2, num_classes=CLASSES
        )


def images() -> DataLoader[tuple[Tensor, ...]]:
    """Return a loader of four batches of noise with labels."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(16, 1, 8, 8, generator=generator)
    return DataLoader(TensorDataset(pixels, torch.arange(16) % CLASSES), batch_size=4)


def broken_decay() -> nn.Module:
    """Return a state-space model with one decay rate at exp(-inf) = 0, which no reader of its loss would see."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SequenceModel(8, 32, "mamba2*1", head_dim=16)
    layer = next(module for module in model.modules() if isinstance(module, Mamba2))
    with torch.no_grad():
        layer.A_log[0] = -torch.inf
    return model


def lose_structure(attention: nn.Module, seed: int = 7) -> None:
    """Draw one layer's weights again, as a late ``reset_parameters`` would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attention.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.1, generator=generator)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, shift: float = 0.0) -> None:
    """Take one step a batch."""
    for pixels, labels in images():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(pixels + shift), labels).backward()
        optimizer.step()
