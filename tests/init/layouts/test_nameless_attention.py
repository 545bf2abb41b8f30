"""Attention whose maps have names that say nothing: what a run finds is right by the forward pass, or left alone."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import espalier
from espalier.errors import EspalierError
from espalier.init.layouts import AttentionWeights, find_layers
from reference.random_attention import DIM, KEYS, STORAGE, Form, RandomAttention, true_diagonals

SPEC = espalier.Mimetic(qk=(0.0, 0.7), vo=(0.0, -0.4))
# What a run of the maps can tell apart; the other ways to store rows are left alone.
READ = ("separate", "blocks", "by_head", "shuffled_blocks", "kv_blocks")


class Nameless(RandomAttention):
    """A ``RandomAttention`` under other names, that does not say how many heads it has."""

    def __init__(self, form: Form) -> None:
        super().__init__(form)
        maps = [name for name, part in self.named_children() if isinstance(part, nn.Linear)]
        renamed = {old: f"map_{'gcaebdf'[place]}" for place, old in enumerate(maps)}
        for old, new in renamed.items():
            self.add_module(new, self._modules.pop(old))
        self.renamed = {**renamed, "num_heads": "_count", "num_kv_heads": "_groups", "head_dim": "_features"}
        for old in ("num_heads", "num_kv_heads", "head_dim"):
            vars(self)[self.renamed[old]] = vars(self).pop(old)

    def __getattr__(self, name: str) -> Any:
        renamed = vars(self).get("renamed", {})
        new = renamed.get(name, name)
        return vars(self)[new] if new in vars(self) else super().__getattr__(new)


class Wrapped(nn.Module):
    """A model that hands it normalised embeddings."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.embed, self.norm, self.mixer = nn.Embedding(40, DIM), nn.LayerNorm(DIM), attention

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return x + self.mixer(self.norm(x))


forms = st.builds(
    Form,
    storage=st.sampled_from(STORAGE),
    heads=st.sampled_from([1, 2, 4, 6]),
    groups=st.sampled_from([0, 1, 2]),
    keys=st.sampled_from(("self",) * 4 + KEYS),
    causal=st.booleans(),
    norm=st.sampled_from(["", "", "rms"]),
    rotary=st.booleans(),
    gate=st.booleans(),
    order=st.integers(0, 2),
    swapped_heads=st.booleans(),
    bias=st.booleans(),
)


@pytest.mark.slow
@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(form=forms, wrapped=st.booleans())
def test_what_a_run_finds_is_right_by_a_forward_pass(form: Form, wrapped: bool) -> None:
    groups = form.groups or form.heads
    heads = form.heads if form.heads % groups == 0 else groups
    form = Form(**{**vars(form), "heads": heads, "groups": heads if "head" in form.storage else groups})
    torch.random.default_generator.manual_seed(0)
    module = Nameless(form).double()
    before = copy.deepcopy(module.state_dict())
    model = Wrapped(module).double() if wrapped else module
    try:
        [row] = espalier.structure_(model, attention=SPEC, generator=torch.Generator().manual_seed(0)).layers
        if row.status == "skipped":
            raise EspalierError(row.note)
    except EspalierError:
        plain = form.keys == "self" and form.storage in READ and not form.swapped_heads and not form.gate
        assert not plain or (form.storage == "by_head" and heads == 1), form
        assert all(torch.equal(a, b) for a, b in zip(before.values(), module.state_dict().values(), strict=True))
        return
    assert row.status == "written"
    assert form.keys in ("self", "context")
    still = Nameless(Form(**{**vars(form), "norm": "", "gate": False})).double()
    names = {new: old for old, new in module.renamed.items()}
    own = {
        still.renamed.get(names.get(name.partition(".")[0], ""), "") + "." + name.partition(".")[2]: value
        for name, value in module.state_dict().items()
    }
    still.load_state_dict({name: value for name, value in own.items() if name in still.state_dict()})
    qk, vo = true_diagonals(still)
    assert qk == pytest.approx(row.measured["qk_diagonal"], abs=1e-6)
    assert vo == pytest.approx(row.measured["vo_diagonal"], abs=1e-6)
    assert qk > 0.05
    assert vo < -0.05


class Own(nn.Module):
    """Matrices of the module's own: ``x @ W``, ``linear(x, W)``, or one a head."""

    def __init__(self, way: str, heads: int = 3) -> None:
        super().__init__()
        self.way, size = way, DIM // heads
        shape, back = ((heads, DIM, size), (heads, size, DIM)) if way == "heads" else ((DIM, DIM), (DIM, DIM))
        self.a, self.e, self.c = (nn.Parameter(torch.randn(shape) * DIM**-0.5) for _ in range(3))
        self.d, self.b_Q = nn.Parameter(torch.randn(back) * DIM**-0.5), nn.Parameter(torch.zeros(heads, size))

    def forward(self, x: Tensor) -> Tensor:
        heads, size = self.b_Q.shape
        if self.way == "heads":
            q, k, v = (torch.einsum("bld,hdk->bhlk", x, part) for part in (self.c, self.a, self.e))
        else:
            parts = [part if self.way == "right" else part.T for part in (self.c, self.a, self.e)]
            q, k, v = ((x @ part).unflatten(-1, (heads, size)).transpose(1, 2) for part in parts)
        mixed = ((q + self.b_Q[:, None]) @ k.mT / size**0.5).softmax(-1) @ v
        if self.way == "heads":
            return torch.einsum("bhlk,hkd->bld", mixed, self.d)
        return mixed.transpose(1, 2).flatten(2) @ (self.d if self.way == "right" else self.d.T)


@pytest.mark.parametrize("way", ["right", "left", "heads"])
def test_matrices_of_the_module_s_own_are_found(way: str) -> None:
    module = Own(way).double()
    [row] = espalier.structure_(module, attention=SPEC, generator=torch.Generator().manual_seed(0)).layers
    assert row.status == "written"
    # A sequence of one token hands its value on: W_V W_out, whose mean diagonal is near −0.4.
    tokens = torch.eye(DIM, dtype=torch.float64)[:, None]
    with torch.no_grad():
        shown = module(tokens)[:, 0].diagonal().mean().item()
    assert shown == pytest.approx(row.measured["vo_diagonal"], abs=1e-6)


class Hooked(nn.Module):
    """Matrices a head, fewer for keys and values, that takes the tokens of each by names of their own."""

    def __init__(self) -> None:
        super().__init__()
        size = DIM // 4
        self.W_Q, self.W_O = nn.Parameter(torch.randn(4, DIM, size)), nn.Parameter(torch.randn(4, size, DIM))
        self._W_K, self._W_V = (nn.Parameter(torch.randn(2, DIM, size)) for _ in range(2))
        self.b_Q, self.b_O = nn.Parameter(torch.randn(4, size)), nn.Parameter(torch.randn(DIM))
        self._b_K, self._b_V = (nn.Parameter(torch.randn(2, size)) for _ in range(2))

    def forward(self, query_input: Tensor, key_input: Tensor, value_input: Tensor) -> Tensor:
        logging.getLogger("hooked").warning("no mask")
        given = ((query_input, self.W_Q), (key_input, self._W_K), (value_input, self._W_V))
        maps = [torch.einsum("bld,hdk->bhlk", x, matrix) for x, matrix in given]
        biased = [part + b[:, None] for part, b in zip(maps, (self.b_Q, self._b_K, self._b_V), strict=True)]
        q, k, v = biased[0], *(part.repeat_interleave(2, 1) for part in biased[1:])
        mixed = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        return torch.einsum("bhlk,hkd->bld", mixed, self.W_O) + self.b_O


class HookedBlock(nn.Module):
    """Hands one sequence to all three, or keys and values of the tokens before."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.ln1, self.attn, self.shift = nn.LayerNorm(DIM), Hooked(), shift

    def forward(self, x: Tensor) -> Tensor:
        normed = self.ln1(x)
        other = normed.roll(self.shift, 1)
        return x + self.attn(query_input=normed, key_input=other, value_input=other)


def test_what_unread_arguments_are_is_asked_of_whoever_calls(caplog: pytest.LogCaptureFixture) -> None:
    block = HookedBlock(0).double()
    [row] = espalier.structure_(block, attention=SPEC, generator=torch.Generator().manual_seed(0)).layers
    assert not caplog.records  # what the layer says in runs that nobody asked for
    assert (row.layer, row.status) == ("attn", "written")
    assert "learned numbers" not in row.note
    # One token hands on its value through W_V W_O; with biases of zero nothing is added to it.
    tokens = torch.eye(DIM, dtype=torch.float64)[:, None]
    with torch.no_grad():
        shown = block.attn(tokens, tokens, tokens)[:, 0]
        assert block.attn(0 * tokens, 0 * tokens, 0 * tokens).abs().max() == 0
    assert shown.diagonal().mean().item() == pytest.approx(row.measured["vo_diagonal"], abs=1e-6)
    # Keys of other tokens are found in the call, and without a call nothing is known.
    for other in (HookedBlock(1), Hooked()):
        assert not [1 for _, _, found in find_layers(other) if isinstance(found, AttentionWeights)]


class Telling(nn.Module):
    """Returns its values for later layers to mix in, and its weights, beside the output; or the output last."""

    def __init__(self, order: tuple[int, ...]) -> None:
        super().__init__()
        self.num_heads, self.order = 4, order
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(DIM, DIM) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        maps = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (part(x).unflatten(-1, (4, -1)).transpose(1, 2) for part in maps)
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        made = self.out_proj((weights @ v).transpose(1, 2).flatten(2)), v, weights
        return tuple(made[place] for place in self.order)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0), (2, 1, 0)])
def test_what_a_layer_returns_beside_its_output_does_not_count(order: tuple[int, ...]) -> None:
    module = Telling(order).double()
    [row] = espalier.structure_(module, attention=SPEC, generator=torch.Generator().manual_seed(0)).layers
    assert row.status == "written"
    with torch.no_grad():
        shown = module(torch.eye(DIM, dtype=torch.float64)[:, None])[order.index(0)][:, 0]
    assert shown.diagonal().mean().item() == pytest.approx(row.measured["vo_diagonal"], abs=1e-6)


class Reweighted(nn.Module):
    """Softmaxes that are no attention of its tokens: over channels, over classes, a gate, shifted values."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.a, self.b, self.c, self.d = (nn.Linear(DIM, DIM) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "channels":
            return self.d((self.a(x).mT @ self.b(x)).softmax(-1) @ self.c(x).mT).mT
        if self.way == "classes":
            return self.d(self.a(x).relu()).softmax(-1)
        if self.way == "shifted":
            return self.d((self.a(x) @ self.b(x).mT).softmax(-1) @ self.c(x).roll(1, 1))
        return self.d(self.a(x).softmax(1) * self.c(x))


@pytest.mark.parametrize("way", ["channels", "classes", "gate", "shifted"])
def test_other_softmaxes_are_no_attention(way: str) -> None:
    assert not [1 for _, _, found in find_layers(Reweighted(way)) if isinstance(found, AttentionWeights)]
