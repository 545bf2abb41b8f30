"""Classes of transformers in which a user's own code stands: a function for scores, a norm, a dropout, a factor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import espalier
from espalier.errors import EspalierError

transformers = pytest.importorskip("transformers")


def attention_of(sign: float, shift: int) -> Callable[..., Any]:
    def run(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        scores = sign * (query @ key.roll(shift, -2).mT) * scaling
        scores = scores if mask is None else scores + mask[..., : key.shape[-2]]
        return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None

    return run


class Changed(nn.Module):
    """Stands where a norm, or a dropout, stood."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(x)


class InAKernel(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("needs a GPU")


def qwen(attention: str = "eager") -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8, "vocab_size": 40}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return transformers.Qwen3Model(transformers.Qwen3Config(**sizes, **heads, attn_implementation=attention))


def changed(**parts: Any) -> nn.Module:
    model = qwen()
    for name, part in parts.items():
        setattr(model.layers[0].self_attn, name, part)
    return model


def with_function(sign: float, shift: int) -> nn.Module:
    name = f"own_{sign}_{shift}"
    transformers.AttentionInterface.register(name, attention_of(sign, shift))
    return qwen(name)


REFUSED: dict[str, Callable[[], nn.Module]] = {
    "a function that turns scores": lambda: with_function(-1.0, 0),
    "a function of other keys": lambda: with_function(1.0, 1),
    "a norm that turns keys": lambda: changed(k_norm=Changed(torch.neg)),
    "a norm of other keys": lambda: changed(k_norm=Changed(lambda x: x.roll(1, 1))),
    "a factor below zero": lambda: changed(scaling=-0.3),
}
WRITTEN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a function of the same scores": (lambda: with_function(1.0, 0), "proven by a run"),
    "a norm that changes nothing": (lambda: changed(k_norm=Changed(lambda x: x)), "k_norm"),
    "a norm that cannot run": (lambda: changed(k_norm=InAKernel(8)), "k_norm (InAKernel) runs code"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_user_s_code_turns_is_left_alone(name: str) -> None:
    with pytest.raises(EspalierError, match="not proven by a run"):
        espalier.structure_(REFUSED[name]())


@pytest.mark.parametrize("name", WRITTEN)
def test_what_it_leaves_as_it_is_is_written(name: str) -> None:
    make, note = WRITTEN[name]
    [row] = espalier.structure_(make()).layers
    assert row.status == "written"
    assert note in row.note
