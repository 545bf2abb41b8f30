"""Attention whose masks mean one thing or another, and models with options that do or do not reach its keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from espalier.errors import EspalierError
from espalier.init import structure_
from espalier.init.layouts.arguments import takes_more

WIDTH, HEADS = 16, 2
Hide = Callable[[Tensor, Tensor], Tensor]
MASKS: dict[str, Hide] = {
    "added": lambda scores, mask: scores + mask,
    "true shows": lambda scores, mask: scores.masked_fill(~mask.bool(), -1e9),
    "true hides": lambda scores, mask: scores.masked_fill(mask.bool(), -1e9),
    "one shows": lambda scores, mask: scores - 1e9 * (1 - mask.to(scores.dtype)),
    "times": lambda scores, mask: scores.masked_fill(mask == 0, float("-inf")),
}
SHOWING = {"added": 0.0, "true shows": 1.0, "true hides": 0.0, "one shows": 1.0, "times": 1.0}


class Masked(nn.Module):
    """Attention that wants a mask, and may want what stands for distances."""

    def __init__(self, hide: Hide, wants_distances: bool = False) -> None:
        super().__init__()
        self.num_heads, self.hide, self.wants_distances = HEADS, hide, wants_distances
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(
        self, x: Tensor, mask: Tensor, distances: Tensor | None = None, context: Tensor | None = None
    ) -> Tensor:
        """Attend; the distances are added to the scores."""
        source = x if context is None else context
        q, k, v = (
            layer(tokens).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for layer, tokens in ((self.q_proj, x), (self.k_proj, source), (self.v_proj, source))
        )
        scores = q @ k.mT / (WIDTH // HEADS) ** 0.5
        if self.wants_distances:
            assert distances is not None
            scores = scores + distances
        y = self.hide(scores, mask).softmax(-1) @ v
        return torch.as_tensor(self.o_proj(y.transpose(1, 2).flatten(2)))


class Model(nn.Module):
    """Token ids, or their vectors in place of them, to vectors; only here is it known what the layer is given."""

    def __init__(self, words: str, **kinds: bool) -> None:
        super().__init__()
        self.embed, self.attention = nn.Embedding(30, WIDTH), Masked(MASKS[words], wants_distances=True)
        self.showing, self.kinds = SHOWING[words], kinds

    def attend(self, ids: Tensor | None, embeds: Tensor | None, context: Tensor | None = None) -> Tensor:
        """Attend over the one or the other."""
        if ids is not None and embeds is not None and not self.kinds.get("both"):
            raise ValueError("give one of both")
        x = embeds if ids is None else self.embed(ids)
        assert x is not None
        if ids is not None and embeds is not None:
            context = embeds
        mask = torch.full((1, 1, x.shape[1], x.shape[1]), self.showing, dtype=x.dtype)
        return torch.as_tensor(self.attention(x, mask, torch.zeros_like(mask), context))


class Deaf(Model):
    """Takes options and never looks at them."""

    def forward(self, ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **options: Any) -> Tensor:
        """Attend."""
        return self.attend(ids, inputs_embeds)


@pytest.mark.parametrize("words", MASKS)
def test_a_mask_that_is_needed_is_given_as_the_layer_takes_it(words: str) -> None:
    net = nn.Sequential()
    net.add_module("layer", Masked(MASKS[words]))
    report = structure_(net, generator=torch.Generator().manual_seed(0))
    assert [layer.status for layer in report.layers] == ["written"]


@pytest.mark.parametrize("words", MASKS)
def test_what_only_the_model_knows_is_seen_in_the_model(words: str) -> None:
    report = structure_(Deaf(words), generator=torch.Generator().manual_seed(0))
    assert [layer.status for layer in report.layers] == ["written"]


def test_a_model_that_takes_vectors_beside_token_ids_is_refused() -> None:
    net = Deaf("true shows", both=True)
    ids, other = torch.randint(30, (1, 4)), torch.rand(1, 4, WIDTH)
    assert not torch.equal(net(ids), net(ids, inputs_embeds=other))
    with pytest.raises(EspalierError, match="no attention"):
        structure_(net, generator=torch.Generator().manual_seed(0))


Options = Callable[..., Any]
READING: dict[str, tuple[Options, bool]] = {
    "never": (lambda x, **options: x, False),
    "hands on": (lambda x, **options: dict(**options), True),
    "by locals": (lambda x, **options: locals()["options"], True),
    "in a function inside": (lambda x, **options: (lambda: options)(), True),
    "a list, never": (lambda x, *options: x, False),
    "a list": (lambda x, *options: options[0], True),
    "takes none": (lambda x: x, False),
}


@pytest.mark.parametrize("words", READING)
def test_whether_a_forward_looks_at_what_it_does_not_name(words: str) -> None:
    module = nn.Identity()
    module.forward, reads = READING[words]  # type: ignore[method-assign]
    assert takes_more(module) == reads
