"""What a report says beside its figures: whose strengths these are, and what stands between products and scores."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

import espalier
from espalier.cli.main import main
from espalier.init import Mimetic, StructureReport
from espalier.models import SequenceModel, VisionTransformer

DIM = 24


def causal() -> nn.Module:
    return SequenceModel(20, DIM, "attention attention", num_heads=3)


def hub(name: str, **changes: object) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 48, "num_attention_heads": 3, "num_hidden_layers": 1, "intermediate_size": 64}
    config = getattr(transformers, f"{name}Config")(**sizes, **changes)
    suffix = {"ViT": "Model", "GPT2": "LMHeadModel"}.get(name, "ForCausalLM")
    return getattr(transformers, name + suffix)(config)


def test_causal_language_models_are_told_of_the_language_preset() -> None:
    words = {"vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2}
    for model in (causal(), hub("Llama", **words), hub("GPT2", **words)):
        report = espalier.structure_(model)
        assert len(report.notes) == 1
        assert 'Mimetic.preset("language")' in str(report)
        assert StructureReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_others_and_other_strengths_are_not() -> None:
    vision = VisionTransformer(img_size=8, patch_size=4, embed_dim=DIM, depth=1, num_heads=3)
    assert espalier.structure_(vision).notes == ()
    assert espalier.structure_(hub("ViT", image_size=8, patch_size=4)).notes == ()
    assert espalier.structure_(causal(), attention=Mimetic.preset("language")).notes == ()
    assert espalier.structure_(causal(), attention=Mimetic(qk=(0.1, 0.2), vo=(0.1, 0.2))).notes == ()


class Attention(nn.Module):
    """Self-attention in a class of its own, with one more part under a name that is given."""

    def __init__(self, name: str = "", part: nn.Module | None = None, first: bool = False) -> None:
        super().__init__()
        self.num_heads, self.part, self.where = 3, name, "first" if first else "last"
        if first:
            self.add_module(name, part)
        for layer in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.add_module(layer, nn.Linear(DIM, DIM))
        if name and not first:
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (getattr(self, f"{name}_proj")(x).unflatten(-1, (3, -1)).transpose(1, 2) for name in "qkv")
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.o_proj(mixed)


@pytest.mark.parametrize(
    ("name", "part", "said"),
    [
        *(
            (name, nn.LayerNorm(8), "are normalised")
            for name in ("q_norm", "k_layernorm", "query_norm", "ln_q", "qk_norm")
        ),
        *(
            (name, nn.LayerNorm(DIM), "before the output projection")
            for name in ("norm", "sub_norm", "out_ln", "g_norm")
        ),
        *((name, nn.Linear(DIM, DIM), "gated") for name in ("gate", "gate_proj", "g_proj", "output_gate", "to_gates")),
        *((name, nn.Linear(1, 1), "rotary") for name in ("rotary_emb", "rope", "rotary")),
    ],
)
def test_what_changes_the_meaning_of_a_product_is_said(name: str, part: nn.Module, said: str) -> None:
    model = nn.ModuleDict({"plain": Attention(), "other": Attention(name, part)})
    notes = {row.layer: row.note for row in espalier.structure_(model).layers}
    assert said in notes["other"]
    assert said not in notes["plain"]
    assert notes["other"].count(said) == 1


def test_a_norm_of_the_input_and_one_that_does_nothing_change_no_product() -> None:
    model = nn.ModuleDict({
        "input": Attention("norm", nn.LayerNorm(DIM), first=True), "nothing": Attention("norm", nn.Identity())
    })  # fmt: skip
    notes = {row.layer: row.note for row in espalier.structure_(model).layers}
    assert not any("output projection" in note for note in notes.values())
    assert "before the projections" in notes["input"]
    assert "before the projections" not in notes["nothing"]


def test_filters_that_the_closed_form_was_not_made_for_carry_a_note() -> None:
    def layer(kernel: int, stride: int = 1) -> nn.Conv2d:
        return nn.Conv2d(8, 8, kernel, stride, groups=8, padding=kernel // 2)

    report = espalier.structure_(nn.Sequential(layer(5), layer(3), layer(5, 2), layer(3, 2)))
    notes = [("3 taps" in row.note, "strided" in row.note) for row in report.layers]
    assert notes == [(False, False), (True, False), (False, True), (True, True)]
    assert all(row.status == "written" for row in report.layers)


def test_a_file_that_is_not_there_is_called_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "nope.safetensors"]) == 2
    said = capsys.readouterr().err.strip()
    assert "nope.safetensors" in said
    assert "no such file" in said
    assert "\n" not in said


def test_a_fit_of_broken_weights_is_one_line(tmp_path: object, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    model = VisionTransformer(img_size=8, patch_size=4, embed_dim=DIM, depth=1, num_heads=3)
    model.blocks[0].attn.qkv.weight.data[0, 0] = torch.nan
    file = f"{tmp_path}/model.safetensors"
    save_file(model.state_dict(), file)
    assert main(["fit", file, "--heads", "3"]) == 2
    said = capsys.readouterr().err.strip()
    assert "blocks.0.attn" in said
    assert "NaN" in said
    assert "\n" not in said
