"""What an audit says of a model that was changed, wrapped or renamed since it was written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import espalier
from espalier.init import StructureReport
from espalier.init.matching import match_rows
from espalier.init.report import LayerReport
from espalier.models import VisionTransformer
from espalier.nn import Mamba2


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small() -> VisionTransformer:
    return VisionTransformer(img_size=8, patch_size=2, in_chans=1, embed_dim=48, depth=3, num_heads=3)


def verdicts(model: nn.Module, report: StructureReport) -> list[tuple[str, str]]:
    return [(row.status, row.note) for row in espalier.audit(model, against=report).layers]


# What is done to q, k, v (rows 0-47, 48-95, 96-143 of qkv, 16 a head) and to proj, and what the audit must say of it.
CHANGES: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor], object], str]] = {
    "queries and keys drawn anew": (lambda qkv, proj: qkv[:96].normal_(std=0.1, generator=seeded()), "lost: qk"),
    "values and outputs drawn anew": (
        lambda qkv, proj: (qkv[96:].normal_(std=0.1, generator=seeded()), proj.normal_(std=0.1, generator=seeded(1))),
        "lost: vo",
    ),
    "outputs negated": (lambda qkv, proj: proj.neg_(), "lost: vo (its sign is the other)"),
    "keys negated": (lambda qkv, proj: qkv[48:96].neg_(), "lost: qk (its sign is the other)"),
    "both negated": (
        lambda qkv, proj: (qkv[:48].neg_(), proj.neg_()),
        "lost: qk (its sign is the other), vo (its sign is the other)",
    ),
    "one head drawn anew": (
        lambda qkv, proj: qkv[16:32].normal_(std=0.1, generator=seeded()),
        "lost: qk of every head",
    ),
    "one head negated": (lambda qkv, proj: qkv[16:32].neg_(), "lost: qk of every head (its sign is the other)"),
    "all zero": (lambda qkv, proj: (qkv.zero_(), proj.zero_()), "lost: qk, vo"),
    "all equal": (lambda qkv, proj: (qkv.fill_(0.3), proj.fill_(0.3)), "lost: qk, vo"),
    "scaled": (lambda qkv, proj: (qkv.mul_(3.0), proj.mul_(0.1)), ""),
    "queries and keys negated together": (lambda qkv, proj: qkv[:96].neg_(), ""),
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_product_is_a_part_with_its_sign(change: str) -> None:
    model = small()
    report = espalier.structure_(model, generator=seeded())
    act, note = CHANGES[change]
    with torch.no_grad():
        act(model.blocks[1].attn.qkv.weight, model.blocks[1].attn.proj.weight)
    assert verdicts(model, report) == [("present", ""), ("lost" if note else "present", note), ("present", "")]


def test_each_part_of_a_state_space_layer_is_judged_on_its_own() -> None:
    layer = Mamba2(32, state_size=8, head_dim=16)
    report = espalier.structure_(layer, ssm=espalier.MimeticSSM(convolution=True), generator=seeded())
    with torch.no_grad():
        layer.A_log.fill_(0.5)
        layer.conv1d.weight.normal_(generator=seeded())
    assert verdicts(layer, report) == [("lost", "lost: decay, convolution")]


class Shell(nn.Module):
    """A wrapper that puts its own name, and others, before those of what it holds."""

    def __init__(self, inner: nn.Module, path: str) -> None:
        super().__init__()
        first, _, rest = path.partition(".")
        setattr(self, first, Shell(inner, rest) if rest else inner)


def checkpointed(model: nn.Module) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    apply_activation_checkpointing(model, check_fn=lambda part: type(part).__name__ in ("Block", "Attention"))
    assert any("_checkpoint_wrapped_module" in name for name, _ in model.named_modules())
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "activation checkpoints": checkpointed,
    "adapters around the model": lambda model: Shell(model, "base_model.model"),
    "causal language model": lambda model: Shell(model, "model"),
    "a name nobody knows": lambda model: Shell(model, "backbone.net"),
    "compiled and parallel": lambda model: nn.DataParallel(torch.compile(model)),
    "all of them": lambda model: Shell(torch.compile(checkpointed(Shell(model, "base_model.model"))), "student"),
}


@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapping_loses_nothing_in_either_direction(wrapper: str, guard: bool) -> None:
    model = small()
    report = espalier.structure_(model, generator=seeded(), guard=guard)
    wrapped = WRAPPERS[wrapper](model)
    assert verdicts(wrapped, report) == [("present", "")] * 3
    inner = small()
    inner.load_state_dict(dict(zip(inner.state_dict(), wrapped.state_dict().values(), strict=True)))
    outside = espalier.audit(wrapped)
    assert verdicts(inner, outside) == [("present", "")] * 3


def test_the_same_layers_under_other_names_are_found_by_their_bits() -> None:
    model = small()
    report = espalier.structure_(model, generator=seeded(), guard=True)
    renamed = nn.ModuleDict({name: model.blocks[index].attn for index, name in enumerate(("c", "a", "b"))})
    after = espalier.audit(renamed, against=report)
    assert [(row.layer, row.status) for row in after.layers] == [("c", "present"), ("a", "present"), ("b", "present")]


def test_what_could_be_either_of_two_is_not_guessed() -> None:
    model = small()
    report = espalier.structure_(model, generator=seeded())
    both = nn.ModuleDict({"encoder": model, "decoder": small()})
    after = espalier.audit(both, against=report)
    assert [row.status for row in after.layers] == ["present"] * 3 + ["absent"] * 3 + ["lost"] * 3


def test_adapters_are_looked_below() -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "vocab_size": 20}
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, num_attention_heads=3, intermediate_size=64)
    )
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes, state_size=8))
    for model, targets in ((llama, ["q_proj", "v_proj"]), (mamba, ["x_proj"])):
        report = espalier.structure_(model, generator=seeded(), guard=True)
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, r=2))
        rows = espalier.audit(adapted, against=report).layers
        assert [row.status for row in rows] == ["present"] * 2
        assert all("below its adapter" in row.note for row in rows)


class Adapter(nn.Module):
    """What LoRA puts in place of a linear layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.lora_A = base, nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})


def test_a_stand_in_for_an_adapter_is_looked_below_and_left_in_place() -> None:
    layer = nn.ModuleDict({"mixer": Mamba2(32, state_size=8, head_dim=16), "attn": small().blocks[0].attn})
    report = espalier.structure_(layer, generator=seeded(), guard=True)
    layer["mixer"].in_proj = Adapter(layer["mixer"].in_proj)
    layer["attn"].qkv = Adapter(layer["attn"].qkv)
    rows = espalier.audit(layer, against=report).layers
    assert [(row.status, "below its adapter" in row.note) for row in rows] == [("present", True)] * 2
    assert isinstance(layer["mixer"].in_proj, Adapter)
    assert isinstance(layer["attn"].qkv, Adapter)


@settings(deadline=None, max_examples=80)
@given(
    names=st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 12)), min_size=1, max_size=8, unique=True),
    prefix=st.lists(st.sampled_from(["module", "_orig_mod", "model", "x"]), max_size=3),
    inside=st.lists(st.sampled_from(["_checkpoint_wrapped_module", "_fsdp_wrapped_module"]), max_size=2),
    turned=st.booleans(),
)
def test_no_wrapper_matches_a_row_to_another_layer(
    names: list[tuple[str, int]], prefix: list[str], inside: list[str], turned: bool
) -> None:
    plain = [f"{part}.{index}.attn" for part, index in names]
    wrapped = [".".join([*prefix, part, str(index), *inside, "attn", *inside]) for part, index in names]
    before, now = (wrapped, plain) if turned else (plain, wrapped)
    rows = [LayerReport(name, "attention", "", "written") for name in before]
    matched = match_rows(rows, [(name, "attention") for name in now], lambda index: "")
    assert {index: row.layer for index, row in matched.items()} == dict(enumerate(before))
