"""Networks that are 1-Lipschitz by construction, from orthogonal convolutions: what ``espalier.certify`` is for."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from espalier.errors import EspalierError, unknown_name
from espalier.models.contract import TimmContract, new_head
from espalier.models.hub import HubModel
from espalier.models.orthogonal_layers import orthogonal_conv
from espalier.nn.lipschitz.activations import Abs, Householder, MaxMin
from espalier.nn.lipschitz.normalisation import BatchCentering, Normalize, NormalizedLinear
from espalier.nn.lipschitz.pooling import InvertibleDownsampling
from espalier.nn.lipschitz.residual import ConvexSum, LinearResidual
from espalier.nn.orthogonal.conv import CayleyConv1d, CayleyConv2d, CayleyConv3d, CayleyConvTranspose2d
from espalier.nn.orthogonal.linear import CayleyLinear
from espalier.sizes import per_axis, whole_number, whole_numbers

ACTIVATIONS: dict[str, Callable[[int], nn.Module]] = {
    "maxmin": lambda channels: MaxMin(),
    "abs": lambda channels: Abs(),
    "householder": Householder,
}
HEADS: dict[str, Callable[..., nn.Module]] = {"orthogonal": CayleyLinear, "normalized": NormalizedLinear}
_DRAWN = (
    *(CayleyConv1d, CayleyConv2d, CayleyConv3d, CayleyConvTranspose2d, CayleyLinear, NormalizedLinear, LinearResidual),
    *(Householder, ConvexSum, Normalize, BatchCentering),
)


class LipschitzNet(TimmContract, HubModel, nn.Sequential):
    """A feature extractor and a head, run one after the other, with timm's contract.

    An ``nn.Sequential`` of ``features`` and ``head``, so that its parts can be taken by their places.

    Args:
        features: 1-Lipschitz modules, the last of which returns (B, num_features).
        num_features: width of the features.
        num_classes: classes; 0 leaves the head out.
        head: ``"orthogonal"`` (Cayley, orthonormal rows) or ``"normalized"`` (rows of unit norm).
        flip_average: in evaluation, the features are the mean (f(x) + f(mirror x))/2 over the image and its mirror
            image, at twice the cost. Still 1-Lipschitz: mirroring is an isometry. For nets that were trained on
            mirrored images (a recipe's ``flip``).

    Raises:
        EspalierError: an unknown head, or sizes that are not whole numbers from 1 (classes: from 0).
    """

    def __init__(
        self,
        features: Iterable[nn.Module],
        num_features: int,
        num_classes: int,
        head: str,
        flip_average: bool = False,
    ) -> None:
        if head not in HEADS:
            raise unknown_name("head", head, HEADS)
        super().__init__(OrderedDict(features=nn.Sequential(*features), head=nn.Identity()))
        num_features = whole_number("num_features", num_features)
        self.num_features, self.embed_dim, self.head_kind = num_features, num_features, head
        self.flip_average = flip_average
        self.reset_classifier(num_classes)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw every parameter; callable again, also after ``to_empty()``. Layers of other libraries are left alone.

        | parameter | distribution |
        |---|---|
        | Cayley weights and biases, linear residuals, normalised head | uniform on ±1/√fan-in |
        | α of Cayley layers | the norm of their weights |
        | angles of Householder activations | π/2 |
        | coefficients of convex sums, statistics of normalisations, running means | those at construction |
        """
        for module in self.modules():
            if isinstance(module, _DRAWN):
                module.reset_parameters(generator)

    def forward(self, input: Tensor) -> Tensor:
        """Return the logits (B, num_classes)."""
        return self.forward_head(self.forward_features(input))

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the features (B, num_features), of the mean over the mirror image where ``flip_average`` says so."""
        if self.flip_average and not self.training:
            return (self._extract(x) + self._extract(x.flip(-1))) / 2
        return self._extract(x)

    def _extract(self, x: Tensor) -> Tensor:
        features: nn.Sequential = self.features  # type: ignore[assignment]
        if not self.grad_checkpointing:
            return features(x)
        share = math.isqrt(max(1, len(features)))  # as many parts as modules in each keep the least
        for start in range(0, len(features), share):
            x = self.run_block(features[start : start + share], x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Classify features; return them as they are with ``pre_logits``."""
        return x if pre_logits else self.head(x)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a fresh one for ``num_classes`` classes; 0 removes it."""
        self.head = new_head(self, HEADS[self.head_kind], self.num_features, num_classes)
        self.num_classes = num_classes

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's patterns that group parameters by layer."""
        return {"stem": r"^features\.0\.", "blocks": r"^features\.(\d+)"}

    def no_weight_decay(self) -> set[str]:
        """Return the parameters exempt from weight decay: the scales α and the angles θ."""
        return {name for name, _ in self.named_parameters() if name.endswith(("alpha", "theta"))}


class KWLarge(LipschitzNet):
    """The network of the Cayley paper's main table: four convolutions, three linear layers, activations between.

    conv(w, 3) → conv(w, stride 2) → conv(2w, 3) → conv(2w, stride 2) → linear(16w) → linear(512) → head. The strided
    layers have one coarse tap: a matrix on blocks of 2×2 pixels, as the original's turn out to be.

    Args:
        width: w, 32 in the paper.
        hidden: outputs of the first linear layer; 16·width if None.
        img_size: side of the images, or (height, width), divisible by 4.
        in_chans: channels of the images.
        num_classes: classes; 0 leaves the head out.
        layer: ``"cayley"``, or a convolution of the library orthogonium: ``"aoc"`` or ``"soc"``.
        head: see ``LipschitzNet``.
        activation: ``"maxmin"``, ``"abs"`` or ``"householder"``.
        flip_average: see ``LipschitzNet``.

    Source: arXiv 2104.07167, section 5, after Wong & Kolter's large net (arXiv 1805.12514).
    """

    def __init__(
        self,
        width: int = 32,
        hidden: int | None = None,
        img_size: int | tuple[int, int] = 32,
        in_chans: int = 3,
        num_classes: int = 10,
        layer: str = "cayley",
        head: str = "orthogonal",
        activation: str = "maxmin",
        flip_average: bool = False,
    ) -> None:
        rows, columns = _sides(img_size, 4)
        whole_numbers(width=width, in_chans=in_chans)
        hidden = 16 * width if hidden is None else whole_number("hidden", hidden)
        features = [
            *_conv(layer, activation, in_chans, width, 3),
            *_conv(layer, activation, width, width, 1, stride=2),
            *_conv(layer, activation, width, 2 * width, 3),
            *_conv(layer, activation, 2 * width, 2 * width, 1, stride=2),
            *_dense(activation, 2 * width * rows * columns // 16, hidden),
        ]
        super().__init__(features, hidden, num_classes, head, flip_average)
        self.input_size = in_chans, rows, columns


class OrthogonalConvNet(LipschitzNet):
    """Stages of orthogonal convolutions at falling resolution, without shortcuts, norms or pooling.

    Pixels are moved into channels in blocks of p × p; every stage then applies ``depths[i]`` k × k convolutions of
    width ``widths[i]``, and the next one begins with a matrix on blocks of 2 × 2 pixels, which halves the image; two
    orthogonal linear layers and the head follow, with an activation after each but the head. With one stage it is a
    patch net. An image of half the side has a quarter of the frequencies and of the activations, so that a net on
    patches takes many more steps in the same time (measured in docs/results/archive/robustness.md).

    Args:
        widths: channels of every stage.
        depths: k × k convolutions of every stage.
        kernel_size: k.
        patch_size: p.
        hidden: outputs of the two linear layers.
        img_size: side of the images, or (height, width), divisible by p·2^(stages − 1).
        in_chans: channels of the images.
        num_classes: classes; 0 leaves the head out.
        layer: see ``KWLarge``.
        head: see ``LipschitzNet``.
        activation: ``"maxmin"``, ``"abs"`` or ``"householder"``.
        flip_average: see ``LipschitzNet``.

    Raises:
        EspalierError: not as many widths as depths, a size out of range, or an image that does not divide.
    """

    def __init__(
        self,
        widths: Sequence[int] = (64,),
        depths: Sequence[int] = (2,),
        kernel_size: int = 3,
        patch_size: int = 4,
        hidden: int = 512,
        img_size: int | tuple[int, int] = 32,
        in_chans: int = 3,
        num_classes: int = 10,
        layer: str = "cayley",
        head: str = "orthogonal",
        activation: str = "maxmin",
        flip_average: bool = False,
    ) -> None:
        if not widths or len(widths) != len(depths):
            raise EspalierError(f"widths {tuple(widths)} and depths {tuple(depths)}: give one of each for every stage")
        whole_numbers(**{f"widths[{stage}]": width for stage, width in enumerate(widths)})
        whole_numbers(0, **{f"depths[{stage}]": depth for stage, depth in enumerate(depths)})
        whole_numbers(kernel_size=kernel_size, patch_size=patch_size, hidden=hidden, in_chans=in_chans)
        shrink = patch_size * 2 ** (len(widths) - 1)
        rows, columns = _sides(img_size, shrink)
        features: list[nn.Module] = [InvertibleDownsampling(patch_size)]
        channels = in_chans * patch_size**2
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            if stage:
                features += _conv(layer, activation, channels, width, 1, stride=2)
                channels = width
            for _ in range(depth):
                features += _conv(layer, activation, channels, width, kernel_size)
                channels = width
        features += _dense(activation, channels * rows * columns // shrink**2, hidden)
        super().__init__(features, hidden, num_classes, head, flip_average)
        self.input_size = in_chans, rows, columns


def _conv(
    layer: str, activation: str, inputs: int, outputs: int, kernel_size: int, stride: int = 1
) -> tuple[nn.Module, nn.Module]:
    return orthogonal_conv(layer, inputs, outputs, kernel_size, stride), _activation(activation, outputs)


def _dense(activation: str, inputs: int, hidden: int) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Flatten()]
    for width in (inputs, hidden):
        layers += [CayleyLinear(width, hidden), _activation(activation, hidden)]
    return layers


def _activation(name: str, channels: int) -> nn.Module:
    if name not in ACTIVATIONS:
        raise unknown_name("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name](channels)


def _sides(img_size: int | tuple[int, int], multiple: int) -> tuple[int, int]:
    rows, columns = per_axis("img_size", img_size, 2)
    if rows % multiple or columns % multiple:
        raise EspalierError(f"img_size {img_size}: sides must be multiples of {multiple}")
    return rows, columns
