"""A page as a browser shows it: headless Chromium draws every figure and reports no error."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from espalier.recipes import Recipe, get_recipe
from espalier.report import write_report
from espalier.study import launch, plan_study
from espalier.train import train
from fabricated_runs import fabricate_trial

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: apt-get install chromium"),
]


def open_page(page: Path, profile: Path, *options: str) -> tuple[str, str]:
    """Return the document after its scripts ran, and what the console and the browser logged."""
    assert CHROMIUM is not None
    quiet = [
        "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--disable-quic", "--disable-gpu", "--hide-scrollbars",
    ]  # fmt: skip
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", *quiet, f"--user-data-dir={profile}", "--enable-logging=stderr",
         "--window-size=1200,2000", "--virtual-time-budget=10000", *options, page.as_uri()],
        capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip
    return done.stdout, done.stderr


def test_browser_draws_every_figure_without_an_error(tmp_path: Path) -> None:
    study = plan_study(Recipe(name="r", epochs=4), ["default", "mimetic"], [1e-3, 1e-2], [0, 1], tmp_path / "study")
    launch(study, workers=0, run=fabricate_trial)
    recipe = replace(get_recipe("digits_vit"), epochs=1, data_args={"train_limit": 128, "test_limit": 50}, threads=1)
    train(recipe, tmp_path / "run", progress=False)
    page = write_report([study.path, tmp_path / "run"], tmp_path / "report.html")
    document, log = open_page(page, tmp_path / "profile", "--dump-dom")
    assert "CONSOLE" not in log, [line for line in log.splitlines() if "CONSOLE" in line]
    # Two figures of the study, three of the run; each svg root holds lines, or one image, that were really drawn.
    plots = re.split(r'<div id="plot-\d+"', document)[1:]
    assert len(plots) == 5
    assert all(plot.count('class="main-svg"') >= 2 for plot in plots)
    lines = [re.search(r'class="js-line"[^>]* d="M[-0-9.]+,', plot) is not None for plot in plots]
    assert [bool(re.search(r'<image[^>]* xlink:href="data:image', plot)) for plot in plots] == [
        not line for line in lines
    ]
    assert lines.count(False) == 1
    assert plots[0].count('class="legendtext') == 2


def test_broken_page_would_be_noticed(tmp_path: Path) -> None:
    page = tmp_path / "broken.html"
    page.write_text("<script>Plotly.newPlot('x', [])</script>")
    _, log = open_page(page, tmp_path / "profile", "--dump-dom")
    assert "Plotly is not defined" in log
    assert "CONSOLE" in log
