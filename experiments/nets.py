"""MLP-Mixer and a residual network, small and plain, to compare ConvMixer with; both join ``espalier.models.MODELS``.

Sources: arXiv 2105.01601, section 2 (Mixer); arXiv 1512.03385, section 4.2 (networks of 6n + 2 layers for CIFAR-10).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from espalier.errors import EspalierError
from espalier.models import MODELS


class _MixerBlock(nn.Module):
    """``x + MLP over tokens of LN(x)``, then ``x + MLP over channels of LN(x)``."""

    def __init__(self, tokens: int, dim: int, token_hidden: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.tokens = nn.Sequential(nn.Linear(tokens, token_hidden), nn.GELU(), nn.Linear(token_hidden, tokens))
        self.channels = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Mix tokens, then channels."""
        x_BTD = x_BTD + self.tokens(self.norm1(x_BTD).mT).mT
        return x_BTD + self.channels(self.norm2(x_BTD))


class MLPMixer(nn.Module):
    """MLP-Mixer: patches, ``depth`` blocks, LayerNorm, the mean over tokens, a linear head.

    Args:
        dim: width D.
        depth: blocks.
        patch_size: p; the image's side is a multiple of it.
        token_hidden: hidden width of the MLP over tokens.
        hidden: hidden width of the MLP over channels.
        img_size: side of the image.
        in_chans: channels of the image.
        num_classes: outputs.

    Raises:
        EspalierError: the image does not divide into patches.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        patch_size: int,
        token_hidden: int,
        hidden: int,
        img_size: int = 32,
        in_chans: int = 3,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        if img_size % patch_size:
            raise EspalierError(f"patch_size {patch_size} does not divide img_size {img_size}: choose a divisor")
        tokens = (img_size // patch_size) ** 2
        self.stem = nn.Conv2d(in_chans, dim, patch_size, patch_size)
        self.blocks = nn.Sequential(*(_MixerBlock(tokens, dim, token_hidden, hidden) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of images."""
        x_BTD = self.stem(x).flatten(2).mT
        return self.head(self.norm(self.blocks(x_BTD)).mean(1))


class _ResidualBlock(nn.Module):
    """Two 3 × 3 convolutions with batch norm and a shortcut that subsamples and pads with zero channels."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.stride, self.more = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """Add the block to its input."""
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        short = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))
        return F.relu(out + short)


class CifarResNet(nn.Module):
    """The residual network of 6n + 2 layers: 16, 32 and 64 channels, n blocks each.

    Args:
        blocks: n; 3 makes ResNet-20.
        width: channels of the first stage.
        in_chans: channels of the image.
        num_classes: outputs.
    """

    def __init__(self, blocks: int = 3, width: int = 16, in_chans: int = 3, num_classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(in_chans, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        channels = width
        for stage in range(3):
            for block in range(blocks):
                outputs = width * 2**stage
                layers.append(_ResidualBlock(channels, outputs, 2 if stage and not block else 1))
                channels = outputs
        self.features, self.head = nn.Sequential(*layers), nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of images."""
        return self.head(self.features(x).mean((2, 3)))


MODELS["mlp_mixer"] = MLPMixer
MODELS["cifar_resnet"] = CifarResNet
