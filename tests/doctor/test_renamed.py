"""What is found in a network does not hang on what its parts and classes are called."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import espalier

SOURCE = """
class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

class BatchNorm(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x.mT).mT

class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.o_proj = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (part(x).unflatten(-1, (4, -1)).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.self_attn = RMSNorm(width), Attention(width)
        self.norm2, self.fc1, self.fc2 = BatchNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        x = x + self.self_attn(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))

class Transformer(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(4))
        self.norm, self.head = RMSNorm(width), nn.Linear(width, 10)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))
"""
CLASSES = ("RMSNorm", "BatchNorm", "Attention", "Block", "Transformer")
PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "norm1", "self_attn", "norm2", "fc1", "fc2", "embed", "layers")
PARTS += ("norm", "head")
LETTERS = "bcdfghjlmpqrtuwxyz"


def network(called: dict[str, str]) -> nn.Module:
    """Return the network with its parts and classes under other names, the same numbers in it."""
    text = re.sub(r"\b(\w+)\b", lambda word: called.get(word[0], word[0]), SOURCE)
    # A part's name is no word of torch's: ``F.gelu`` and ``nn.Linear`` stay.
    space: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "__name__": "renamed"}
    exec(text, space)
    torch.manual_seed(0)
    return space[called.get("Transformer", "Transformer")]()


def garbage(tensor: Tensor) -> None:
    tensor.copy_(torch.rand(tensor.shape) * 1e-39)


FAULTS: dict[str, tuple[str, Callable[[Tensor], Any]]] = {
    "nothing": ("layers.1.fc1.weight", lambda w: w),
    "a NaN": ("layers.1.fc1.weight", lambda w: w.view(-1)[3].fill_(torch.nan)),
    "queries of zero": ("layers.2.self_attn.q_proj.weight", lambda w: w.zero_()),
    "keys of zero": ("layers.0.self_attn.k_proj.weight", lambda w: w.zero_()),
    "a head of zero": ("layers.0.self_attn.k_proj.weight", lambda w: w[:8].zero_()),
    "equal rows": ("layers.1.self_attn.v_proj.weight", lambda w: w.copy_(w[:1].clone().expand_as(w))),
    "equal halves": ("layers.1.fc1.weight", lambda w: w[:32].copy_(w[32:])),
    "thirty times": ("layers.3.fc2.weight", lambda w: w.mul_(30)),
    "a hundredth": ("layers.3.self_attn.o_proj.weight", lambda w: w.div_(100)),
    "one number": ("layers.0.self_attn.o_proj.weight", lambda w: w.fill_(0.02)),
    "gain of zero": ("layers.2.norm1.weight", lambda w: w.zero_()),
    "gain from noise": ("layers.2.norm1.weight", lambda w: w.normal_(std=0.02)),
    "gain of a batch norm from noise": ("layers.2.norm2.weight", lambda w: w.normal_(std=0.02)),
    "last gain of zero": ("norm.weight", lambda w: w.zero_()),
    "variance never written": ("layers.0.norm2.running_var", garbage),
    "tokens a hundred times": ("embed.weight", lambda w: w.mul_(100)),
}


def findings(model: nn.Module, place: str, fault: str) -> list[tuple[str, str, str]]:
    torch.manual_seed(1)
    with torch.no_grad():
        FAULTS[fault][1](dict(itertools.chain(model.named_parameters(), model.named_buffers()))[place])
    return [(found.severity, found.check, found.layer) for found in espalier.diagnose(model).findings]


# A part cannot be called what every module has (``cpu``), nor what says of it what it is not: ``ctx`` that its keys are
# another sequence's, ``wq`` that it makes queries.
name = st.text(LETTERS, min_size=2, max_size=5).filter(lambda text: not hasattr(nn.Module, text))
name = name.filter(lambda text: text not in ("ctx", "wq"))
names = st.lists(name, min_size=18, max_size=18, unique=True)


@pytest.mark.parametrize("fault", sorted(FAULTS))
@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=names)
def test_findings_do_not_hang_on_names(fault: str, names: Sequence[str]) -> None:
    called = dict(zip(PARTS, names, strict=False)) | {
        old: new.title() for old, new in zip(CLASSES, names[len(PARTS) :], strict=True)
    }
    place, _ = FAULTS[fault]
    there = ".".join(called.get(part, part) for part in place.split("."))
    wanted = findings(network({}), place, fault)
    renamed = [
        (severity, check, ".".join(called.get(part, part) for part in layer.split(".")))
        for severity, check, layer in wanted
    ]
    assert findings(network(called), there, fault) == renamed
    assert any(severity != "note" for severity, _, _ in wanted) is (fault != "nothing")
