"""`espalier doctor` on models by name, files, folders and runs: what it prints, and the exit status to gate on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from espalier.cli.main import main
from espalier.models import build_model


def test_healthy_model_is_one_line_and_status_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "espalier:vit", "--strict"]) == 0
    assert capsys.readouterr().out.startswith("healthy: ")
    assert main(["doctor", "espalier:vit", "--probe"]) == 0


def test_errors_are_status_1_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = build_model("vit", img_size=16, embed_dim=48, depth=4, num_heads=3).state_dict()
    state["blocks.1.attn.qkv.weight"] = torch.zeros_like(state["blocks.1.attn.qkv.weight"])
    save_file(state, tmp_path / "model.safetensors")
    for place in (tmp_path / "model.safetensors", tmp_path):
        with pytest.raises(SystemExit) as stop:
            main(["doctor", str(place), "--json"])
        assert stop.value.code == 1
        found = json.loads(capsys.readouterr().out)["findings"]
        assert [(f["severity"], f["check"], f["layer"]) for f in found] == [
            ("error", "constant", "blocks.1.attn.qkv.weight")
        ]


def test_warnings_are_status_1_only_if_strict(tmp_path: Path) -> None:
    state = build_model("vit", img_size=16, embed_dim=48, depth=6, num_heads=3).state_dict()
    state["blocks.3.mlp.2.weight"] = state["blocks.3.mlp.2.weight"] * 9
    save_file(state, tmp_path / "model.safetensors")
    assert main(["doctor", str(tmp_path / "model.safetensors")]) == 0
    with pytest.raises(SystemExit):
        main(["doctor", str(tmp_path / "model.safetensors"), "--strict"])


def test_run_folder_is_opened_as_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    flags = ["--epochs", "1", "--data-args.train-limit", "128", "--data-args.test-limit", "100", "--threads", "1"]
    assert main(["train", "digits_vit", *flags, "--out", str(out), "--quiet"]) == 0
    capsys.readouterr()
    assert main(["doctor", str(out), "--probe"]) == 0
    assert "trained weights" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["doctor", str(out), "--against", str(out / "start.safetensors")])
    assert "overwritten" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["doctor", "vit"], "model 'vit': no such file or folder"),
        (["doctor", "espalier:vitt"], "unknown model 'vitt': did you mean 'vit'"),
        (["doctor", "BROKEN"], "cannot be read"),
    ],
)
def test_bad_input_is_one_line(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not weights")
    assert main([str(broken) if word == "BROKEN" else word for word in argv]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def shards(folder: Path) -> Path:
    """Write a small transformer as two shards and their index, and return the index."""
    state = build_model("vit", img_size=16, embed_dim=48, depth=2, num_heads=3).state_dict()
    halves = {"a.safetensors": list(state)[::2], "b.safetensors": list(state)[1::2]}
    for name, half in halves.items():
        save_file({key: state[key] for key in half}, folder / name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: name for name, half in halves.items() for key in half}}))
    save_file(state, folder.parent / "whole.safetensors")
    return index


@pytest.mark.parametrize("command", ["audit", "fit"])
def test_shards_are_opened_as_the_whole_file_is(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "net").mkdir()
    index = shards(tmp_path / "net")
    said = []
    for place in (tmp_path / "whole.safetensors", index, tmp_path / "net"):
        assert main([command, str(place), "--heads", "3"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] == said[2] != ""
    (index.parent / "b.safetensors").unlink()
    assert main([command, str(index), "--heads", "3"]) == 2
    assert "b.safetensors cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["../whole.safetensors", "ABSOLUTE", "sub/a.safetensors", "..", "", "x\\a"])
@pytest.mark.parametrize("command", ["audit", "doctor"])
def test_an_index_does_not_lead_out_of_its_folder(
    command: str, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "net").mkdir()
    index = shards(tmp_path / "net")
    named = str(tmp_path / "whole.safetensors") if place == "ABSOLUTE" else place
    content = json.loads(index.read_text())
    content["weight_map"]["norm.weight"] = named
    index.write_text(json.dumps(content))
    for path in (index, index.parent):
        assert main([command, str(path)]) == 2
        error = capsys.readouterr().err
        assert f"index {index}: {named!r:.100} is no file beside it: name its shards without folders" in error
        assert error.count("\n") == 1
