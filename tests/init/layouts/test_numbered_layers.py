"""Layers that differ in their number alone: one proof is that of all only where they compute the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import espalier


class Numbered(nn.Module):
    """Attention whose odd layers do something else, as their number says."""

    def __init__(self, number: int, kind: str) -> None:
        super().__init__()
        self.layer_idx, self.kind, self.num_heads = number, kind, 2
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(32, 32, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (2, 16)).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj))
        odd, weights = self.layer_idx % 2, (q @ k.mT / 4).softmax(-1)
        if odd and self.kind == "a gate":
            return self.o_proj(((weights @ q) * v).transpose(1, 2).flatten(2))
        heads = weights @ v
        if odd and self.kind == "one head turned":
            heads = heads * torch.tensor([1.0, -1.0], dtype=x.dtype).view(2, 1, 1)
        out = self.o_proj(heads.transpose(1, 2).flatten(2))
        turned = -out if self.kind == "turned" else out.flip(-1) if self.kind == "in another order" else out
        return turned if odd else out


@pytest.mark.parametrize("kind", ["a gate", "turned", "one head turned", "in another order"])
@pytest.mark.parametrize("odd_first", [False, True])
def test_layers_that_do_something_else_by_their_number_are_not_taken_for_the_others(kind: str, odd_first: bool) -> None:
    numbers = [1, 0, 3, 2] if odd_first else [0, 1, 2, 3]
    report = espalier.structure_(
        nn.ModuleList([Numbered(number, kind) for number in numbers]), generator=torch.Generator().manual_seed(0)
    )
    for number, row in zip(numbers, report.layers, strict=True):
        assert (row.status == "written" and "stands before" not in row.note) == (number % 2 == 0), (number, row.note)


class Taking(nn.Module):
    """Attention that attends to whatever tokens it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(32, 32, bias=False) for _ in range(4))

    def forward(self, x: Tensor, others: Tensor | None = None) -> Tensor:
        tokens = (x, x if others is None else others, x if others is None else others)
        maps = zip((self.q_proj, self.k_proj, self.v_proj), tokens, strict=True)
        q, k, v = (part(each).unflatten(-1, (2, 16)).transpose(1, 2) for part, each in maps)
        return self.o_proj(((q @ k.mT / 4).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Giving(nn.Module):
    """Whoever calls attention, and hands it other tokens than its own where its number is odd."""

    def __init__(self, number: int, kind: str) -> None:
        super().__init__()
        self.layer_idx, self.kind, self.inner = number, kind, Taking()
        self.kept = nn.Parameter(torch.randn(1, 5, 32))

    def forward(self, x: Tensor) -> Tensor:
        others = {"its own": x, "turned": -x, "in another order": x.flip(1), "kept": self.kept.expand(len(x), -1, -1)}
        return x + self.inner(x, others[self.kind] if self.layer_idx % 2 else None)


@pytest.mark.parametrize("kind", ["turned", "in another order", "kept"])
@pytest.mark.parametrize("odd_first", [False, True])
def test_layers_that_are_given_other_tokens_by_their_number_are_not_taken_for_the_others(
    kind: str, odd_first: bool
) -> None:
    numbers = [1, 0, 3, 2] if odd_first else [0, 1, 2, 3]
    report = espalier.structure_(
        nn.ModuleList([Giving(number, kind) for number in numbers]), generator=torch.Generator().manual_seed(0)
    )
    for number, row in zip(numbers, report.layers, strict=True):
        assert (row.status == "written") == (number % 2 == 0), (number, row.note)
