"""Keys of other tokens, however they come: past a wrapper that hands on what it gets, from a batch's other examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import espalier
from espalier.errors import EspalierError

DIM, HEADS = 32, 2


class Own(nn.Module):
    """Attention in code of one's own; ``keys`` says whose it takes where none are given."""

    def __init__(self, keys: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.num_heads, self.keys = HEADS, keys
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(DIM, DIM, bias=False) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        y = self.keys(x) if context is None else context
        maps = (self.q_proj(x), self.k_proj(y), self.v_proj(y))
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in maps)
        weights = (q @ k.mT / (DIM // HEADS) ** 0.5).softmax(-1)
        return torch.as_tensor(self.o_proj((weights @ v).transpose(1, 2).flatten(2)))


class Torch(nn.Module):
    """The same with torch's layer."""

    def __init__(self, keys: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.attn, self.keys = nn.MultiheadAttention(DIM, HEADS, batch_first=True), keys

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        y = self.keys(x) if context is None else context
        return torch.as_tensor(self.attn(x, y, y)[0])


class Decoder(nn.Module):
    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.own, self.cross = make(), make()

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = x + self.own(x)
        return torch.as_tensor(x + self.cross(x, context=context))


class Named(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, stage: str = "train", **rest: Any) -> Tensor:
        return torch.as_tensor(self.net(x, **rest))


class Listed(Named):
    def forward(self, x: Tensor, *rest: Any, scale: float = 1.0) -> Tensor:  # type: ignore[override]
        return torch.as_tensor(self.net(x, *rest)) * scale


class Both(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.encoder, self.net = nn.Linear(DIM, DIM), net

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return torch.as_tensor(self.net(target, context=self.encoder(source)))


@pytest.mark.parametrize("make", [Own, Torch])
@pytest.mark.parametrize("wrap", [Named, Listed, lambda net: Named(Named(net)), lambda net: Both(Named(net))])
def test_a_wrapper_that_hands_on_what_it_gets_hides_no_second_sequence(make: Any, wrap: Any) -> None:
    report = espalier.structure_(wrap(Decoder(make)), generator=torch.Generator().manual_seed(0))
    status = {row.layer.replace(".attn", "").rpartition(".")[2]: row.status for row in report.layers}
    assert status == {"own": "written", "cross": "skipped"}


# Images of two views, halves of guided diffusion, frames: of four examples, whose keys each of them gets.
def _first_of_each_half(x: Tensor) -> Tensor:
    halves = x.unflatten(0, (min(2, len(x)), -1))
    return halves[:, :1].expand_as(halves).flatten(0, 1)


OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "the other half": lambda x: torch.cat(x.chunk(2, 0)[::-1]),
    "the first": lambda x: x[:1].expand_as(x),
    "the first of each half": _first_of_each_half,
    "the next": lambda x: x.roll(1, 0),
}


class Outside(nn.Module):
    """Its owner hands the layer the other keys."""

    def __init__(self, keys: Callable[[Tensor], Tensor], make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.attn, self.keys = make(), keys

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(x + self.attn(x, self.keys(x)))


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("make", [Own, Torch, lambda keys: Outside(keys, Own), lambda keys: Outside(keys, Torch)])
def test_keys_of_another_example_are_other_tokens(make: Callable[..., nn.Module], kind: str) -> None:
    net, x = make(OTHERS[kind]).eval(), torch.randn(4, 6, DIM)
    moved = x.clone()
    moved[3, 5] += 1
    with torch.no_grad():
        assert torch.allclose(net(moved)[3, 0], net(x)[3, 0])  # an example's own tokens move nothing but themselves
    with pytest.raises(EspalierError, match=r"another example|other tokens"):
        espalier.structure_(net, generator=torch.Generator().manual_seed(0))


class Alone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(DIM, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.attn(x, x, x)[0])


@pytest.mark.parametrize("make", [Own, Alone, lambda: Outside(lambda x: x, Own), lambda: Outside(lambda x: x, Torch)])
def test_examples_that_keep_apart_are_written(make: Callable[..., nn.Module]) -> None:
    report = espalier.structure_(make(), generator=torch.Generator().manual_seed(0))
    assert [row.status for row in report.layers] == ["written"]


@pytest.mark.parametrize("folded", ["(batch rows) columns", "(columns batch) rows"])
def test_folding_axes_into_the_batch_keeps_examples_apart(folded: str) -> None:
    class Axial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(DIM, HEADS, batch_first=True)

        def forward(self, image: Tensor) -> Tensor:
            x = image.permute(0, 2, 3, 1) if folded[1] == "b" else image.permute(3, 0, 2, 1)
            rows = x.flatten(0, 1)
            return torch.as_tensor(self.attn(rows, rows, rows)[0].view_as(x))

    net = nn.Sequential(nn.Conv2d(3, DIM, 4, 4), Axial())
    report = espalier.structure_(net, generator=torch.Generator().manual_seed(0), depthwise=None)
    assert [row.status for row in report.layers] == ["written"]
