"""Attention of classes that nobody registered: guessed from names and shapes, checked by forward passes, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import espalier
from espalier.init.layouts import Skipped, find_layers
from reference.attention_probe import check_attention, views_of
from reference.random_attention import Form, RandomAttention

DIM = 24


class Plain(nn.Module):
    """Self-attention written by hand over linear layers of any names; ``order`` says how the projections are stored."""

    def __init__(self, names: tuple[str, ...], heads: int = 3, groups: int | None = None, stated: str = "num_heads"):
        super().__init__()
        self.names, self.count, self.g = names, heads, groups or heads
        setattr(self, stated, heads if "head" in stated and "dim" not in stated else DIM // heads)
        rows = [DIM, DIM // heads * self.g, DIM // heads * self.g]
        widths = {4: rows, 3: [rows[0], 2 * rows[1]], 2: [sum(rows)]}[len(names)]
        for name, width in zip(names, [*widths, None], strict=True):
            self.add_module(name, nn.Linear(DIM, width) if width else nn.Linear(DIM, DIM))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        joined = torch.cat([self.get_submodule(name)(x) for name in self.names[:-1]], -1)
        width, shared = DIM // self.count, self.count // self.g
        q, k, v = joined.split([DIM, width * self.g, width * self.g], -1)
        q, k, v = (part.unflatten(-1, (-1, width)).transpose(1, 2) for part in (q, k, v))
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
        maps = (q @ k.mT / width**0.5).softmax(-1)
        return self.get_submodule(self.names[-1])((maps @ v).transpose(1, 2).flatten(2)), maps


@pytest.mark.parametrize(
    ("names", "stated"),
    [
        (("q_proj", "k_proj", "v_proj", "o_proj"), "head_dim"),
        (("q_proj", "k_proj", "v_proj", "out_proj"), "num_heads"),
        (("query", "key", "value", "dense"), "num_attention_heads"),
        (("wq", "wk", "wv", "wo"), "n_heads"),
        (("to_q", "to_k", "to_v", "to_out"), "heads"),
        (("to_q", "to_kv", "to_out"), "heads"),
        (("c_attn", "c_proj"), "n_head"),
        (("to_qkv", "to_out"), "heads"),
        (("Wqkv", "Wo"), "num_heads"),
        (("c_q", "c_k", "c_v", "c_proj"), "n_head"),
        (("queries", "keys", "values", "fc_out"), "heads"),
        (("query_projection", "key_projection", "value_projection", "out_projection"), "n_heads"),
        (("fc_q", "fc_k", "fc_v", "fc_o"), "d_k"),
        (("w_qs", "w_ks", "w_vs", "fc"), "n_head"),
        (("q", "kv", "proj"), "num_heads"),
        (("W_Q", "W_K", "W_V", "to_out"), "n_heads"),
    ],
)
@pytest.mark.parametrize("groups", [6, 2])
def test_known_names_are_recognised_as_a_guess(names: tuple[str, ...], stated: str, groups: int) -> None:
    module = Plain(names, 6, groups, stated).double()
    assert "guessed" in views_of(module).note
    check_attention(module, module, DIM, 6, groups)


@pytest.mark.parametrize("before", [[], [nn.Identity()], [nn.RMSNorm(DIM)]])
def test_output_inside_a_sequence(before: list[nn.Module]) -> None:
    module = Plain(("to_qkv", "to_out"), stated="heads").double()
    inner = module.to_out
    module.to_out = nn.Sequential(*before, inner, nn.Dropout(0.0)).double()
    assert views_of(module).out.data_ptr() == inner.weight.data_ptr()
    if not before or isinstance(before[0], nn.Identity):
        check_attention(module, module, DIM, 3)


def test_bert_s_two_modules() -> None:

    class Output(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(DIM, DIM)

    class Bert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Plain(("query", "key", "value", "spare"))
            self.attention.spare = nn.Identity()
            self.output = Output()
            self.num_heads = 3

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            mixed, maps = self.attention(x)
            return self.output.dense(mixed), maps

    bert = Bert().double()
    check_attention(bert, bert, DIM, 3)


def reason(module: nn.Module) -> str:
    [(_, _, found)] = find_layers(module)
    assert isinstance(found, Skipped), found
    before = [p.clone() for p in module.parameters()]
    holder = nn.ModuleList([module, Plain(("wq", "wk", "wv", "wo"))])
    assert [row.status for row in espalier.structure_(holder).layers] == ["skipped", "written"]
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    return found.reason


class Lora(nn.Module):
    """What an adapter library leaves in place of a linear layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.lora_A = base, nn.ModuleDict({"default": nn.Linear(DIM, 2, bias=False)})

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight


class Packed(nn.Module):
    """A quantised linear layer: whole numbers and a scale."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(DIM, DIM, dtype=dtype))


FOUR = ("q_proj", "k_proj", "v_proj", "o_proj")


def test_adapters_and_quantised_weights_are_refused() -> None:
    module = Plain(FOUR)
    module.q_proj = Lora(module.q_proj)
    assert "adapter (LoRA)" in reason(module)
    for dtype in (torch.int8, torch.uint8, torch.float8_e4m3fn):
        module = Plain(FOUR)
        module.v_proj = Packed(dtype)
        assert "v_proj is quantised" in reason(module)


def test_parametrised_weights_are_refused() -> None:
    module = Plain(FOUR)
    nn.utils.parametrizations.weight_norm(module.k_proj)
    assert "parametrised" in reason(module)


def test_missing_and_tied_projections_are_refused() -> None:
    module = Plain(FOUR)
    module.o_proj = nn.Identity()
    assert "o_proj is missing" in reason(module)
    module = Plain(FOUR)
    del module.o_proj
    assert "no output projection" in reason(module)
    module = Plain(FOUR)
    module.k_proj.weight = module.q_proj.weight
    assert "tied" in reason(module)


def test_cross_attention_is_told_by_name_and_by_width() -> None:
    model = nn.ModuleDict({"self_attn": Plain(FOUR), "cross_attn": Plain(FOUR), "encoder_attn": Plain(FOUR)})
    statuses = {row.layer: row.status for row in espalier.structure_(model).layers}
    assert statuses == {"self_attn": "written", "cross_attn": "skipped", "encoder_attn": "skipped"}
    module = Plain(FOUR)
    module.k_proj, module.v_proj = nn.Linear(16, DIM), nn.Linear(16, DIM)
    assert "cross-attention" in reason(module)


class OfTwo(Plain):
    """Attention that may be handed another sequence."""

    def attend(self, x: Tensor, other: Tensor | None) -> Tensor:
        keys = x if other is None else other
        inputs = (self.q_proj(x), self.k_proj(keys), self.v_proj(keys))
        q, k, v = (part.unflatten(-1, (self.count, -1)).transpose(1, 2) for part in inputs)
        return self.o_proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Shifted(OfTwo):
    """Attention with an optional argument that has nothing to do with its keys."""

    def attend(self, x: Tensor, other: Tensor | None) -> Tensor:
        return super().attend(x, None) + (0 if other is None else other)


class Block(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attn = attention

    def attend(self, x: Tensor, other: Tensor | None) -> Tensor:
        return x + self.attn(x, other)


class Caller(nn.Module):
    def __init__(self, block: nn.Module, crossed: bool) -> None:
        super().__init__()
        self.block, self.other, self.crossed = block, nn.Linear(DIM, DIM), crossed

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, self.other(x)) if self.crossed else self.block(x)


def taking(name: str, base: type[nn.Module]) -> type[nn.Module]:
    """Return a class whose second argument has a name."""
    made: dict[str, Any] = {}
    exec(f"def forward(self, x, {name}=None): return self.attend(x, {name})", made)
    return type(base.__name__, (base,), {"forward": made["forward"]})


@pytest.mark.parametrize("name", ["context", "ctx", "enc_output", "c", "z", "text", "prompt", "audio_features"])
def test_a_second_sequence_is_seen_whatever_it_is_called(name: str) -> None:
    for base, crossed, status in (
        (OfTwo, False, "written"),
        (OfTwo, True, "skipped"),
        (Shifted, True, "written"),
    ):
        if base is Shifted and name in ("context", "ctx", "enc_output"):
            continue  # what is called so is taken at its word
        block = taking(name, Block)(taking(name, base)(FOUR))
        model = nn.ModuleDict({"one": Caller(block, crossed), "two": Plain(FOUR)})
        rows = {row.layer: row for row in espalier.structure_(model, generator=torch.Generator().manual_seed(0)).layers}
        assert rows["one.block.attn"].status == status
        if status == "skipped":
            assert "other tokens than its queries" in rows["one.block.attn"].note


class Hidden(OfTwo):
    """Attention that finds another sequence among its keyword arguments."""

    def forward(self, x: Tensor, **options: Any) -> Tensor:  # type: ignore[override]
        return self.attend(x, options.get("seen"))


class Hider(nn.Module):
    def __init__(self, crossed: bool) -> None:
        super().__init__()
        self.attn, self.other, self.crossed = Hidden(FOUR), nn.Linear(DIM, DIM), crossed

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, **({"seen": self.other(x)} if self.crossed else {"unused": self.other(x)}))


def test_a_second_sequence_among_keyword_arguments_is_seen() -> None:
    for crossed, status in ((False, "written"), (True, "skipped")):
        model = nn.ModuleDict({"one": Hider(crossed), "two": Plain(FOUR)})
        rows = {row.layer: row for row in espalier.structure_(model, generator=torch.Generator().manual_seed(0)).layers}
        assert rows["one.attn"].status == status
        assert rows["two"].status == "written"


@pytest.mark.parametrize("names", [FOUR, ("c_attn", "c_proj"), ("to_q", "to_kv", "to_out")])
@pytest.mark.parametrize("heads", [1, 3])
def test_a_number_of_heads_that_no_known_name_states_is_proven_by_a_run(names: tuple[str, ...], heads: int) -> None:
    module = Plain(names, heads).double()
    del module.num_heads  # it goes by its ``count``, or needs none
    check_attention(module, module, DIM, heads)


class Unrunnable(Plain):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


def test_what_cannot_be_known_is_not_guessed() -> None:
    module = Unrunnable(FOUR)
    del module.num_heads
    assert "number of heads is not stated" in reason(module)
    module = Plain(FOUR)
    module.num_heads = 5
    assert "5 heads do not divide" in reason(module)
    assert list(find_layers(nn.Sequential(nn.Linear(3, 3)))) == []


@pytest.mark.parametrize("value", [None, False, 1.0])
def test_an_attribute_that_is_no_tensor_is_no_computed_weight(value: bool | float | None) -> None:
    # Norms without a bias have one of None for some (diffusers), or keep the option under the name.
    model = RandomAttention(Form(bias=True))
    model.register_module("norm", nn.Identity())
    model.norm.bias = value
    model.norm.weight = value
    assert not any(isinstance(found, Skipped) for _, _, found in find_layers(model))


def test_maps_may_stand_in_a_sequence_with_what_holds_no_weights() -> None:
    class Split(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.unflatten(-1, (3, 4, 8)).movedim(-3, 0).transpose(2, 3)

    class Wrapped(nn.Module):
        heads = 4

        def __init__(self) -> None:
            super().__init__()
            self.to_qkv = nn.Sequential(nn.Linear(32, 96, bias=False), Split())
            self.to_out = nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.1))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.to_qkv(x)
            weights = (q @ k.mT / 8**0.5).softmax(-1)
            return torch.as_tensor(self.to_out((weights @ v).transpose(1, 2).flatten(2)))

    module = Wrapped()
    [row] = espalier.structure_(module, generator=torch.Generator().manual_seed(0)).layers
    assert (row.status, "stands" in row.note) == ("written", False)
    x = torch.eye(32)[None]  # tokens that are the unit vectors: with queries of zero, an output is the mean of all
    with torch.no_grad():
        q, k, _ = module.to_qkv(x)[:, 0]
        qk = (q @ k.mT).diagonal(0, -2, -1).mean()
    assert float(qk) == pytest.approx(row.measured["qk_diagonal"], rel=1e-4)
