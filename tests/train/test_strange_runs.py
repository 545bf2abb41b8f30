"""Run folders of strangers, their digests right: what their files say is read, or refused by name in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from espalier.cli.main import main
from espalier.errors import EspalierError
from espalier.integrations.hub import model_card
from espalier.report import write_report
from espalier.report.run_sections import environment, outcome, recipe, run_curves, structure
from espalier.report.section import Context
from espalier.study.record import record_run
from espalier.train import load_run
from espalier.train.image_input import ImageInput
from espalier.train.manifest import digest
from espalier.train.run import seal

SMALL = (
    "--epochs", "1", "--data-args.train-limit", "32", "--data-args.test-limit", "20", "--batch-size", "16", "--quiet",
    "--threads", "1",
)  # fmt: skip
VIT = (
    "--init", "structured", "--model-args.patch-size", "4", "--model-args.embed-dim", "12", "--model-args.depth", "1",
    "--model-args.num-heads", "3",
)  # fmt: skip
VALUES: tuple[Any, ...] = (None, -1, 10**400, "x", [[1]], {"a": []}, float("nan"))
SAID = ("recipe", "model", "images", "result", "environment", "structure", "metrics", "manifest")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on digits that began with structure."""
    run = tmp_path_factory.mktemp("stranger") / "run"
    assert main(["train", "digits_vit", *SMALL, *VIT, "--out", str(run)]) == 0
    return run


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every value inside one of JSON, and to itself."""
    yield at
    for key in value if isinstance(value, dict) else range(min(len(value), 2)) if isinstance(value, list) else ():
        yield from places(value[key], (*at, key))


def changed(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    if not at:
        return new
    copy = value.copy()
    copy[at[0]] = changed(value[at[0]], at[1:], new)
    return copy


def write(run: Path, name: str, value: Any) -> None:
    """Write what a file of a run says, and make the digests those of what is there."""
    if name == "manifest":
        if isinstance(value, dict):
            value = {key: found for key, found in value.items() if key != "digest"}
            value["digest"] = digest(json.dumps(value, sort_keys=True).encode())
        (run / "manifest.json").write_text(json.dumps(value))
        return
    if name == "metrics":
        rows = value if isinstance(value, list) else [value]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        (run / f"{name}.json").write_text(json.dumps(value))
    seal(run, json.loads((run / "manifest.json").read_text())["notes"])


def read_all(path: Path) -> None:
    run = load_run(path)
    for section in (outcome, run_curves, structure, recipe, environment):
        section(run, Context(path.parent, {}))
    run.model()
    ImageInput.load(path).normalizer()
    record_run(run, "study", "arm")
    model_card(run)


@pytest.mark.parametrize("name", SAID)
def test_whatever_a_file_says_is_read_or_refused_in_one_line(finished: Path, tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    if name == "metrics":
        said: Any = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    else:
        said = json.loads((run / f"{name}.json").read_text())
    read_all(run)
    refused = 0
    for at in places(said):
        for value in VALUES:
            write(run, name, changed(said, at, value))
            try:
                read_all(run)
            except EspalierError:
                refused += 1
    assert refused > 5


def test_numbers_that_are_not_finite_are_no_prediction(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    weights = load_file(tmp_path / "run/final.safetensors")
    weights["head.weight"].fill_(torch.nan)
    save_file(weights, tmp_path / "run/final.safetensors")
    seal(tmp_path / "run", {})
    Image.new("L", (8, 8), 100).save(tmp_path / "0.png")
    assert main(["predict", str(tmp_path / "run"), str(tmp_path / "0.png"), "--json"]) == 2
    said = capsys.readouterr()
    assert not said.out
    assert "no finite numbers" in said.err


@pytest.mark.parametrize("logits", [9, 12])
def test_a_net_with_other_logits_than_classes_names_no_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], logits: int
) -> None:
    """Their number is the net's own affair in training; a class without a name is one when it is named."""
    monkeypatch.setenv("ESPALIER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\n\ndef net(num_classes=10, **_):\n"
        f"    return nn.Sequential(nn.Flatten(), nn.Linear(64, {logits}), nn.Dropout(0))\n"
    )
    run, picture = tmp_path / "run", tmp_path / "0.png"
    trained = main(["train", "digits_vit", *SMALL, "--model", f"{tmp_path / 'net.py'}:net", "--out", str(run)])
    if logits < 10:
        assert trained == 2
        return
    assert trained == 0
    Image.new("L", (8, 8), 100).save(picture)
    assert main(["predict", str(run), str(picture)]) == 2
    assert "12 logits for 10 names of classes" in capsys.readouterr().err
    assert "Not counted: the model has 12 logits" in write_report([run], tmp_path / "page.html").read_text()
