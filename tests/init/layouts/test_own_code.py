"""Code that runs is the code that was looked at: each layer by itself, in its model, with what runs around it."""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import espalier
from espalier.errors import EspalierError
from espalier.init.layouts.keys import module_key
from espalier.init.layouts.registry import LAYOUTS, class_path
from espalier.models import vit

DIM, HEADS = 32, 4


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class Attention(nn.Module):
    """Fused self-attention whose rows are in the order that something of the layer's own says."""

    def __init__(self, order: Callable[[], str] = lambda: "qkv") -> None:
        super().__init__()
        self.num_heads, self.order = HEADS, order
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM, bias=False), nn.Linear(DIM, DIM, bias=False)
        self.logits = torch.zeros(0)

    def forward(self, x: Tensor) -> Tensor:
        parts = dict(zip(self.order(), self.qkv(x).chunk(3, -1), strict=True))
        q, k, v = (parts[name].unflatten(-1, (HEADS, -1)).transpose(1, 2) for name in "qkv")
        self.logits = q @ k.mT * (DIM // HEADS) ** -0.5
        return self.proj((self.logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Settings:
    """What a layer may keep the order in."""

    def __init__(self, order: str) -> None:
        self.nested = types.SimpleNamespace(attention={"orders": [order]})


def constant(order: str) -> str:
    return order


def by_buffer(layer: Attention) -> str:
    return "kvq" if bool(layer.marker) else "qkv"


def by_number(layer: Attention) -> str:
    return "kvq" if layer.layer_idx % 2 else "qkv"


def keeping(kind: str, order: str) -> Attention:
    """Return a layer that keeps its order in a place of one kind."""
    layer = Attention()
    if kind == "dictionary":
        layer.kept = {"order": order}
        layer.order = functools.partial(lambda kept: kept["order"], layer.kept)
    elif kind == "nested":
        layer.order = functools.partial(lambda s: s.nested.attention["orders"][0], Settings(order))
    elif kind == "partial":
        layer.order = functools.partial(constant, order)
    elif kind == "closure":
        layer.order = lambda: order
    elif kind == "default":
        layer.order = lambda order=order: order
    elif kind == "method":
        layer.order = types.MethodType(lambda settings: settings.nested.attention["orders"][0], Settings(order))
    elif kind == "buffer":
        layer.register_buffer("marker", torch.tensor(order == "kvq"))
        layer.order = types.MethodType(by_buffer, layer)
    elif kind == "number":
        layer.layer_idx = int(order == "kvq")
        layer.order = types.MethodType(by_number, layer)
    return layer


KINDS = ("dictionary", "nested", "partial", "closure", "default", "method", "buffer", "number")


@pytest.mark.parametrize("kind", KINDS)
def test_a_verdict_on_one_layer_is_none_on_another_that_computes_something_else(kind: str) -> None:
    model = nn.Sequential(keeping(kind, "qkv"), keeping(kind, "kvq"), keeping(kind, "qkv"))
    report = espalier.structure_(model, generator=seeded())
    assert [row.status for row in report.layers] == ["written", "skipped", "written"]
    x = torch.randn(1, DIM, DIM, generator=seeded())
    for layer in (model[0], model[2]):
        layer(x)
        gram = (x[0] @ x[0].T).flatten()
        for logits in layer.logits[0]:
            assert torch.corrcoef(torch.stack([logits.flatten(), gram]))[0, 1] > 0.4


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_differ_in_nothing_share_a_verdict(kind: str) -> None:
    assert module_key(keeping(kind, "qkv")) == module_key(keeping(kind, "qkv"))
    assert module_key(keeping(kind, "qkv")) != module_key(keeping(kind, "kvq"))


def test_a_method_that_is_replaced_on_the_class_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Local(Attention):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    espalier.structure_(Local(), generator=seeded())
    monkeypatch.setattr(
        Local, "forward", lambda self, x: keeping("closure", "kvq").forward(x) + self.proj(self.qkv(x)[..., :DIM])
    )
    with pytest.raises(EspalierError, match=r"not proven|cannot be run"):
        espalier.structure_(Local(), generator=seeded())


class Projections(nn.Module):
    """Attention with four layers, which may be handed another sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(DIM, DIM, bias=False) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        parts = (self.to_q(x), self.to_k(context), self.to_v(context))
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        return self.to_out(((q @ k.mT * (DIM // HEADS) ** -0.5).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A block that hands on what it may be given."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.attn = Projections() if kind == "own" else nn.MultiheadAttention(DIM, HEADS, batch_first=True)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if isinstance(self.attn, Projections):
            return x + self.attn(x, context=context)
        keys = x if context is None else context
        return x + self.attn(x, keys, keys)[0]


class Stack(nn.Module):
    def __init__(self, kind: str, cross: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(kind) for _ in range(2))
        self.cross = cross


class Decoder(Stack):
    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, context=memory if self.cross else None)
        return x


@pytest.mark.parametrize("kind", ["own", "torch"])
def test_who_hands_on_a_second_sequence_is_asked_by_whoever_calls_it(kind: str) -> None:
    with pytest.raises(EspalierError, match="other tokens than its queries"):
        espalier.structure_(Decoder(kind, cross=True))
    report = espalier.structure_(Decoder(kind, cross=False))
    assert [row.status for row in report.layers] == ["written", "written"]
    with pytest.raises(EspalierError, match="other tokens than its queries"):
        espalier.structure_(Block(kind))  # nobody says what it is given


def test_values_of_another_sequence_are_noticed() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(DIM, HEADS, batch_first=True)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.attn(x, x, y)[0]

    with pytest.raises(EspalierError, match="other tokens than its queries"):
        espalier.structure_(Mixed())


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.in_features**-0.5)


class Around(Projections):
    """Attention with something around its products."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.extra = how, nn.Linear(DIM, DIM, bias=False)
        if how == "equalised":
            for name in ("to_q", "to_k", "to_v", "to_out"):
                setattr(self, name, Scaled(DIM, DIM, bias=False))

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        out = super().forward(self.extra(x) if self.how == "before" else x)
        return {"after": lambda: self.extra(out), "taken away": lambda: x - out}.get(self.how, lambda: out)()


@pytest.mark.parametrize(("how", "words"), [
    ("plain", ""), ("before", "something stands before"), ("after", "something stands before"),
    ("equalised", "its output: 0.0.* times the value-output product"), ("taken away", "with the other sign"),
])  # fmt: skip
def test_what_stands_around_the_products_is_said_and_the_other_sign_refused(how: str, words: str) -> None:
    model = Around(how)
    if how == "taken away":
        with pytest.raises(EspalierError, match=words):
            espalier.structure_(model)
        return
    [row] = espalier.structure_(model, generator=seeded()).layers
    assert row.status == "written"
    if not words:
        assert "stands" not in row.note
        assert "times" not in row.note
    assert re.search(words, row.note)


def replaced(layer: nn.Module) -> None:
    layer.forward = types.MethodType(lambda self, x, *_, **__: (self.out_proj(x), None), layer)


def test_what_runs_around_a_layer_is_refused_unless_it_only_looks() -> None:
    seen: list[Tensor] = []
    observers: list[Any] = [lambda _, __, out: seen.append(out), lambda _, __, out: out]
    for hook in observers:
        model = Attention()
        model.qkv.register_forward_hook(hook)
        assert espalier.structure_(model).layers[0].status == "written"
    assert not seen
    for hook in (
        lambda _, __, out: out.roll(DIM, -1),
        lambda _, __, out: out.mul_(2),
        lambda _, __, out: out.add_(1) and None,
    ):
        model = Attention()
        model.qkv.register_forward_hook(hook)
        with pytest.raises(EspalierError, match=r"a hook .* runs after each call"):
            espalier.structure_(model)
    layer = nn.TransformerEncoderLayer(DIM, HEADS, batch_first=True)
    replaced(layer.self_attn)
    with pytest.raises(EspalierError, match=r"a replaced forward .* runs in place of each call"):
        espalier.structure_(layer)


def test_a_forward_that_is_wrapped_in_its_class_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = vit.Attention.forward

    @functools.wraps(theirs)  # so that it bears the name of the library's module
    def negated(self: vit.Attention, x: Tensor) -> Tensor:
        return -theirs(self, x)

    monkeypatch.setattr(vit.Attention, "forward", negated)
    with pytest.raises(EspalierError, match="with the other sign"):
        espalier.structure_(vit.Attention(DIM, HEADS))
    monkeypatch.setattr(vit.Attention, "forward", functools.wraps(theirs)(lambda self, x: theirs(self, x)))
    assert espalier.structure_(vit.Attention(DIM, HEADS)).layers[0].status == "written"


outputs: list[Tensor] = []


def test_a_hook_that_is_tried_leaves_no_trace() -> None:
    def keep(part: nn.Linear, _: Any, out: Tensor) -> None:
        part.last = out
        part.get_buffer("mean").lerp_(out.mean((0, 1)), 0.1)
        outputs.append(out)

    model = Attention()
    model.qkv.register_buffer("mean", torch.zeros(3 * DIM))
    model.qkv.register_forward_hook(keep)
    before = set(vars(model.qkv))
    assert espalier.structure_(model, generator=seeded()).layers[0].status == "written"
    assert set(vars(model.qkv)) == before
    assert not model.qkv.mean.any()
    assert not outputs
    model(torch.randn(1, 3, DIM))  # what it keeps now is part of a graph, which cannot be copied
    assert espalier.structure_(model, generator=seeded()).layers[0].status == "written"


@pytest.mark.parametrize("hook", [
    lambda _, __, out: out + 0 * torch.randn_like(out),
    lambda part, _, __: part.weight.data.clamp_(-0.1, 0.1) and None,
])  # fmt: skip
def test_a_hook_that_draws_or_writes_weights_is_refused_without_doing_so(hook: Any) -> None:
    model = Attention()
    model.qkv.register_forward_hook(hook)
    before, state = model.qkv.weight.clone(), torch.get_rng_state()
    with pytest.raises(EspalierError, match=r"a hook .* runs after each call"):
        espalier.structure_(model, generator=seeded())
    assert torch.equal(model.qkv.weight, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_plain_module_as_the_root_takes_no_proof_away() -> None:
    model = nn.Module()
    model.attn = keeping("closure", "kvq")
    with pytest.raises(EspalierError, match="not proven by a run"):
        espalier.structure_(model)


def test_frozen_layers_and_filters_that_were_set_by_hand_are_left_alone() -> None:
    taps = torch.tensor([1.0, 2.0, 1.0])
    blur = (taps[:, None] * taps / 16).expand(8, 1, 3, 3)
    model = nn.Sequential(*(nn.Conv2d(8, 8, k, padding=k // 2, groups=8) for k in (7, 3, 5)))
    model[1].weight.data.copy_(blur)
    model[2].requires_grad_(False)
    report = espalier.structure_(model, generator=seeded())
    assert [row.status for row in report.layers] == ["written", "skipped", "skipped"]
    assert "set by hand" in report.layers[1].note
    assert "frozen" in report.layers[2].note
    assert torch.equal(model[1].weight, blur)
    # A model that is frozen as a whole says nothing of one layer.
    report = espalier.structure_(nn.Conv2d(8, 8, 7, padding=3, groups=8).requires_grad_(False))
    assert report.layers[0].status == "written"


@pytest.mark.parametrize("last", [True, False])
def test_filters_of_which_a_part_is_masked_are_left_alone(last: bool) -> None:
    class Masked(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            mask = torch.ones(5, 5)
            (mask[3:] if last else mask[:2]).zero_()
            return F.conv2d(x, self.weight * mask.to(self.weight), self.bias, 1, 2, 1, self.groups)

    with pytest.raises(EspalierError, match="its weight is not the kernel"):
        espalier.structure_(nn.Sequential(Masked(8, 8, 5, groups=8)))


class Rolled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).roll(self.out_features // 3, -1)


class Same(nn.Linear):
    """A layer with code of its own that changes nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


def mixed_up(self: Any, x: Tensor) -> Tensor:
    parts = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
    k, v, q = parts
    return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("how", ["rolled", "patched", "same", "registered"])
def test_a_known_class_is_known_only_while_its_library_s_code_runs(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = espalier.models.VisionTransformer(
        img_size=8, patch_size=4, embed_dim=24, depth=1, num_heads=4, num_classes=2
    )
    attention = model.blocks[0].attn
    if how == "patched":
        monkeypatch.setattr(type(attention), "forward", mixed_up)
    elif how != "registered":
        attention.qkv = {"rolled": Rolled, "same": Same}[how](24, 72)
    if how == "registered":  # the user's own word on a class holds, whatever its layers are
        attention.qkv = Rolled(24, 72)
        layout = LAYOUTS[class_path(type(attention))]
        monkeypatch.setitem(LAYOUTS, class_path(type(attention)), lambda module: layout(module))
    if how in ("rolled", "patched"):
        with pytest.raises(EspalierError, match="not proven by a run"):
            espalier.structure_(model, generator=seeded())
        return
    assert espalier.structure_(model, generator=seeded()).layers[0].status == "written"


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_a_state_space_layer_with_a_map_of_the_user_s_own_is_written_if_a_run_proves_it(kind: str) -> None:
    for own, status in ((Rolled, "skipped"), (Same, "written")):
        model = espalier.models.SequenceModel(vocab_size=8, dim=64, pattern=f"{kind}*2", state_size=4)
        name = "x_proj" if kind == "mamba1" else "in_proj"
        mixer = model.layers[1].mixer
        mapped = mixer.get_submodule(name)
        setattr(mixer, name, own(mapped.in_features, mapped.out_features, bias=False))
        report = espalier.structure_(model, generator=seeded())
        assert [row.status for row in report.layers] == ["written", status]
        assert ("not proven by a run of it" if own is Rolled else "proven by a run") in report.layers[1].note
