"""A bare state dictionary shows the audit that its model shows."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import espalier
from espalier.checkpoints.by_shape import skeleton
from espalier.checkpoints.loading import open_checkpoint
from espalier.cli.main import main
from espalier.errors import EspalierError
from espalier.init import fit
from espalier.models import ConvMixer, VisionTransformer

transformers = pytest.importorskip("transformers")


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def vit() -> nn.Module:
    return VisionTransformer(img_size=8, patch_size=2, embed_dim=48, depth=2, num_heads=3)


def hub(name: str, **changes: object) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        config = getattr(transformers, f"{name}Config")(
            hidden_size=48, num_attention_heads=3, num_hidden_layers=2, intermediate_size=64, vocab_size=20, **changes
        )
        return getattr(transformers, f"{name}Model")(config)

    return make


MODELS: dict[str, Callable[[], nn.Module]] = {
    "own": vit,
    "torch": lambda: nn.TransformerDecoder(nn.TransformerEncoderLayer(48, 3, batch_first=True), 2),
    "convmixer": lambda: ConvMixer(32, 2, 5, 2),
    "bert": hub("Bert"),
    "gpt2": hub("GPT2"),
    "llama": hub("Llama", num_key_value_heads=1),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_skeleton_measures_what_its_model_measures(name: str) -> None:
    model = MODELS[name]()
    espalier.structure_(model, generator=seeded())
    theirs = espalier.audit(model).layers
    ours = espalier.audit(skeleton(model.state_dict(), 3)).layers
    assert [(row.layer, row.kind, row.status) for row in ours] == [(row.layer, row.kind, row.status) for row in theirs]
    for one, two in zip(ours, theirs, strict=True):
        assert one.measured == pytest.approx(two.measured, rel=1e-5, abs=1e-6)
    if theirs[0].kind == "attention":
        assert all("guessed" in row.note for row in ours)
        [pair, *_] = zip(
            fit(skeleton(model.state_dict(), 3)).rows["attention"], fit(model).rows["attention"], strict=True
        )
        assert pair[0].qk_asked == pytest.approx(pair[1].qk_asked)


def test_heads_come_from_the_caller_or_from_the_config_beside_it(tmp_path: Path) -> None:
    model = vit()
    espalier.structure_(model, generator=seeded())
    file = tmp_path / "model.safetensors"
    save_file(model.state_dict(), file)
    rows = espalier.audit(open_checkpoint(file)).layers
    assert {row.status for row in rows} == {"skipped"}
    assert "number of heads is not stated: give the right one (heads, --heads)" in rows[0].note
    with pytest.raises(EspalierError, match=r"BareCheckpoint has no structure to fit: .*heads"):
        fit(open_checkpoint(file))
    assert {row.status for row in espalier.audit(open_checkpoint(file, 3)).layers} == {"present"}
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 3}))
    assert {row.status for row in espalier.audit(open_checkpoint(file)).layers} == {"present"}


def test_nested_and_quantised_checkpoints(tmp_path: Path) -> None:
    state = vit().state_dict()
    torch.save({"model": state, "epoch": 3}, tmp_path / "a.pt")
    assert len(espalier.audit(open_checkpoint(tmp_path / "a.pt", 3)).layers) == 2
    state["blocks.0.attn.qkv.weight"] = state["blocks.0.attn.qkv.weight"].to(torch.int8)
    rows = espalier.audit(skeleton(state, 3)).layers
    assert [row.status for row in rows] == ["skipped", "absent"]
    assert "quantised" in rows[0].note


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("code from a checkpoint ran",))


def test_what_cannot_be_read_safely_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"not a checkpoint")
    torch.save({"a": Evil()}, tmp_path / "evil.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("broken.safetensors", "evil.pt", "list.pt"):
        with pytest.raises(EspalierError, match=name) as caught:
            open_checkpoint(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert "ran" not in capsys.readouterr().out


def test_command_line_audits_and_fits_files_and_hub_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = vit()
    spec = espalier.Mimetic(qk=(0.2, 0.9), vo=(0.1, -0.6))
    espalier.structure_(model, attention=spec, generator=seeded())
    file = tmp_path / "model.safetensors"
    save_file(model.state_dict(), file)
    assert main(["audit", str(file), "--heads", "3"]) == 0
    assert capsys.readouterr().out.count("present") == 2
    found = tmp_path / "fit.json"
    assert main(["fit", str(file), "--heads", "3", "--out", str(found)]) == 0
    capsys.readouterr()
    out = tmp_path / "init.safetensors"
    assert main(["structure", "espalier:vit", "--like", str(found), "--out", str(out)]) == 0
    asked = re.findall(r"vo \S+·Z (\S+)·I", capsys.readouterr().out)
    assert [float(beta) for beta in asked] == pytest.approx([-0.6] * len(asked), abs=0.02)
    assert asked
    assert main(["structure", "espalier:vit", "--like", str(file), "--out", str(out)]) == 2
    assert "\n" not in capsys.readouterr().err.strip()

    folder = tmp_path / "hub"
    hub("Llama", num_key_value_heads=1)().save_pretrained(folder)
    capsys.readouterr()
    assert main(["audit", str(folder)]) == 0
    assert capsys.readouterr().out.count("absent") == 2
