"""A run on the hub: its card says what the run's own files say, and the model that comes back scores what it scored."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import espalier
from espalier.errors import EspalierError
from espalier.integrations.hub import model_card, push_run, save_run
from espalier.recipes import get_recipe
from espalier.study.record import record_from_line
from espalier.train import Run, train
from espalier.train.certify_runs import certificate_path, certify_run
from hub_standin import Hub, serve

pytest.importorskip("huggingface_hub")
pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    recipe = replace(
        get_recipe("digits_vit"), epochs=1, init="mimetic", data_args={"train_limit": 128, "test_limit": 100}
    )
    return train(recipe, tmp_path_factory.mktemp("runs") / "digits", progress=False)


def test_card_carries_recipe_numbers_structure_and_record(run: Run) -> None:
    card = model_card(run)
    blocks = re.findall(r"```json\n(.*?)```", card, re.DOTALL)
    recipe, record = json.loads(blocks[0]), record_from_line(blocks[1].strip())
    assert recipe["init"] == "mimetic"
    assert recipe["data_args"] == {"train_limit": 128, "test_limit": 100}
    assert record.score == pytest.approx(run.result["score"], abs=1e-5)  # type: ignore[index]
    assert f"| {record.metric} | {record.score:.4g} |" in card
    assert "qk 0.7·Z +0.7·I" in card
    assert str(run.path.parent) not in card  # a card is public: no folder of the machine that trained


def test_shared_model_scores_what_the_run_scored(run: Run, hub: Hub) -> None:
    push_run(run, "trees/pear")
    model = espalier.models.VisionTransformer.from_pretrained("trees/pear")
    images, labels = run.source().images("test")
    normalised = torch.nn.Sequential(run.source().normalizer, model).eval()
    with torch.no_grad():
        correct = (normalised(images).argmax(1) == labels).double().mean().item()
    assert 100 * correct == pytest.approx(run.result["score"], abs=0.51) or correct == pytest.approx(  # type: ignore[index]
        run.result["score"],
        abs=0.0051,  # type: ignore[index]
    )
    assert b"library_name: espalier" in hub.repositories["trees/pear"]["README.md"]


def test_certificate_travels_with_the_model(tmp_path: Path) -> None:
    recipe = replace(get_recipe("digits_robust"), epochs=1, data_args={"train_limit": 128, "test_limit": 50})
    robust = train(recipe, tmp_path / "run", progress=False)
    assert "Certificate" not in model_card(robust)
    certificate = certify_run(robust)
    certificate.save(certificate_path(robust.path))
    folder = save_run(robust, tmp_path / "shared")
    assert certificate.table() in (folder / "README.md").read_text()
    assert json.loads((folder / "certificate.json").read_text())
    robust.path.rename(tmp_path / "old")
    other = train(replace(recipe, seed=1), tmp_path / "run", progress=False)
    for share in (model_card, partial(save_run, folder=tmp_path / "shared2")):
        with pytest.raises(EspalierError, match=r"certificate\.json is of other weights"):
            share(other)
    assert not (tmp_path / "shared2").exists()


def test_what_was_said_of_other_weights_never_stands_beside_a_run(run: Run, tmp_path: Path) -> None:
    other = train(replace(run.recipe, seed=1), tmp_path / "other", progress=False)
    folder = save_run(run, tmp_path / "shared")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(EspalierError, match=r"README.md is a card of other weights"):
        save_run(other, folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    (folder / "README.md").write_text((folder / "README.md").read_text() + "A note of mine.\n")
    assert save_run(run, folder) == folder  # the same run again: what was written to its card since stays
    assert (folder / "README.md").read_text().endswith("A note of mine.\n")
    (folder / "certificate.json").write_text("{}")
    with pytest.raises(EspalierError, match=r"certificate.json is not this run's certificate"):
        save_run(run, folder)


def test_the_run_folder_itself_and_a_file_are_refused_and_stay(run: Run, tmp_path: Path) -> None:
    before = {file.name for file in run.path.iterdir()}
    with pytest.raises(EspalierError, match="is the run's own folder"):
        save_run(run, run.path)
    assert {file.name for file in run.path.iterdir()} == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(EspalierError, match="is no folder"):
        save_run(run, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_unfinished_runs_are_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(EspalierError, match="not finished"):
        model_card(replace(run, result=None))
    with pytest.raises(EspalierError, match="not a run folder"):
        save_run(tmp_path, tmp_path / "out")


def test_command_line_reads_the_hub_and_then_its_cache(run: Run, tmp_path: Path) -> None:
    with serve() as served:
        folder = save_run(run, tmp_path / "shared")
        served.repositories["trees/pear"] = {path.name: path.read_bytes() for path in folder.iterdir()}
        here = {"HF_ENDPOINT": served.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        first = audit("espalier:trees/pear", here)
        assert first.returncode == 0, first.stderr
        asked = len(served.asked)
        second = audit("espalier:trees/pear", here | {"HF_HUB_OFFLINE": "1"})
        assert second.stdout == first.stdout
        assert len(served.asked) == asked
    gone = audit("espalier:trees/apple", here | {"HF_HUB_OFFLINE": "1"})
    assert gone.returncode == 2
    assert gone.stderr.count("\n") == 1, gone.stderr


def audit(model: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "espalier", "audit", model]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
