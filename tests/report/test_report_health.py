"""The page of a run says what the doctor found in the weights that it started from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from espalier.files import read_tensors, write_tensors
from espalier.recipes import get_recipe
from espalier.report import write_report
from espalier.train import train
from espalier.train.manifest import file_digest, read_manifest, write_manifest
from espalier.train.run import START


def test_page_shows_the_health_of_the_start(tmp_path: Path) -> None:
    limits = {"train_limit": 128, "test_limit": 100}
    run = train(replace(get_recipe("digits_vit"), epochs=1, data_args=limits, threads=1), tmp_path / "run")
    page = write_report([run.path], tmp_path / "page.html").read_text()
    assert "Health at the start" in page
    assert "healthy: " in page
    state = read_tensors(run.path / START)
    write_tensors(run.path / START, state | {"head.weight": torch.full_like(state["head.weight"], torch.nan)})
    files, notes = read_manifest(run.path)
    write_manifest(run.path, {**files, START: [file_digest(run.path / START)]}, notes)
    page = write_report([run.path], tmp_path / "page.html").read_text()
    assert "1 error" in page
    assert "not-finite" in page
