"""Networks that move their axes by einops are bounded: it asks shapes for their sizes, and keeps what it learnt."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange, reduce, repeat
from einops.layers.torch import Rearrange
from torch import Tensor, nn

from espalier.certify import UncertifiableError, lipschitz_bound


class Runs(nn.Module):
    def __init__(self, pattern: str, function: object = rearrange, **sizes: int) -> None:
        super().__init__()
        self.pattern, self.function, self.sizes = pattern, function, sizes

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.pattern, **self.sizes)


class Mean(Runs):
    def forward(self, x: Tensor) -> Tensor:
        return reduce(x, self.pattern, "mean")


@pytest.mark.parametrize(
    ("layer", "constant"),
    [
        (Runs("b c h w -> b (c h w)"), 1.0),
        (Runs("b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2), 1.0),
        (Runs("b c h w -> b c h w r", repeat, r=4), 2.0),
        (Mean("b c h w -> b c"), 0.25),
        (Rearrange("b c (h p) w -> b (c p) h w", p=2), 1.0),
    ],
)
def test_moves_within_an_image(layer: nn.Module, constant: float) -> None:
    assert lipschitz_bound(layer, torch.rand(3, 3, 4, 4)) == pytest.approx(constant)


def test_images_that_meet_are_refused() -> None:
    with pytest.raises(UncertifiableError, match="images would meet"):
        lipschitz_bound(Runs("b c h w -> (b c) h w"), torch.rand(3, 3, 4, 4))
