"""Multi-query recall that answers only where it is asked: the same task and loss for a tenth of the time.

Of the 64 places of a row, 4 have a target; logits over 8,192 tokens at the other 60 would be most of a step's work.
Inputs are tokens followed by the places that are asked, (B, L + P); logits are (B, P, V).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from espalier.data import SOURCES, GeneratedSource
from espalier.data.sequences import mqar_source
from espalier.data.source import IGNORED
from espalier.models import MODELS, SequenceModel

if TYPE_CHECKING:
    from espalier.recipes import Recipe


class AskedSequenceModel(SequenceModel):
    """A ``SequenceModel`` whose inputs end in the ``asked`` places that it has to answer at."""

    # build_model reads the signature, so the arguments are spelt out.
    def __init__(
        self,
        vocab_size: int,
        dim: int,
        pattern: str,
        *,
        asked: int,
        state_size: int | None = None,
        head_dim: int = 64,
        num_heads: int = 1,
        mlp_ratio: float = 0.0,
    ) -> None:
        super().__init__(
            vocab_size, dim, pattern, state_size=state_size, head_dim=head_dim, num_heads=num_heads, mlp_ratio=mlp_ratio
        )
        self.asked = asked

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits (B, P, V) of tokens and places (B, L + P)."""
        tokens_BL, places_BP = inputs[:, : -self.asked], inputs[:, -self.asked :]
        features_BLD = self.forward_features(tokens_BL)
        wanted = places_BP[:, :, None].expand(-1, -1, features_BLD.shape[-1])
        return self.forward_head(features_BLD.gather(1, wanted))


class AskedSource:
    """A generated source whose targets are gathered at the places that have one, as many in every row."""

    def __init__(self, source: GeneratedSource) -> None:
        self._source = source

    @property
    def model_args(self) -> Mapping[str, Any]:
        """The size of the vocabulary."""
        return self._source.model_args

    @property
    def eval_splits(self) -> tuple[str, ...]:
        """One, two and four times the training length."""
        return self._source.eval_splits

    def to(self, device: torch.device | str) -> Self:
        """Draw on ``device`` from now on."""
        self._source = self._source.to(device)
        return self

    def steps_per_epoch(self, batch_size: int) -> int:
        """Return the number of batches called an epoch."""
        return self._source.steps_per_epoch(batch_size)

    def train_batch(self, seed: int, epoch: int, step: int, batch_size: int) -> tuple[Tensor, Tensor]:
        """Return inputs (B, L + P) and targets (B, P)."""
        return gather_asked(*self._source.train_batch(seed, epoch, step, batch_size))

    def eval_batches(self, split: str, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the examples of ``split`` in their fixed order."""
        for inputs_BL, targets_BL in self._source.eval_batches(split, batch_size):
            yield gather_asked(inputs_BL, targets_BL)


def gather_asked(inputs_BL: Tensor, targets_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Return tokens with the asked places behind them (B, L + P), and the targets there (B, P)."""
    asked_BL = targets_BL != IGNORED
    places_BP = asked_BL.nonzero()[:, 1].reshape(len(targets_BL), -1)
    return torch.cat([inputs_BL, places_BP], dim=1), targets_BL.gather(1, places_BP)


def asked_mqar_source(recipe: Recipe) -> AskedSource:
    """Return multi-query recall with ``mqar``'s arguments and examples."""
    return AskedSource(mqar_source(replace(recipe, dataset="mqar")))


MODELS["asked_sequence"] = AskedSequenceModel
SOURCES["asked_mqar"] = asked_mqar_source
