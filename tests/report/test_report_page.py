"""Pages over studies and runs: everything that was found is on them, and they load nothing from elsewhere."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import scipy.stats

import espalier
from espalier.errors import EspalierError
from espalier.recipes import Recipe, get_recipe
from espalier.report import write_report
from espalier.report.curves import learning_curves, score_over_rate
from espalier.report.section import Context
from espalier.study import Study, plan_study, summarise
from espalier.study.table import assumptions, cells, sentences
from espalier.study.trial import FAILURE
from espalier.train import train
from fabricated_runs import fabricate, usual_score
from small_study import recorded, train_study

RECIPE = Recipe(name="r", epochs=4)


class Page(HTMLParser):
    """What a browser would load, link to and show as text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.loads: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self.text, self.scripts = "", ""
        self._open: list[str] = []
        self.feed(path.read_text())
        assert self._open == [], f"elements left open: {self._open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attributes)
        self.loads += [value for key in ("src", "srcset", "data", "poster") if (value := given.get(key))]
        self.links += [given["href"] or ""] if tag == "a" else []
        self.loads += [given["href"] or ""] if "href" in given and tag != "a" else []
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
        if tag not in ("meta", "img", "br", "link"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("script", "style"):
            self.scripts += data
            return
        self.text += data
        if self._open and {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data

    def folders(self) -> list[Path]:
        """Return where the links that leave the page lead."""
        return [self.path.parent / unquote(link) for link in self.links if not link.startswith("#")]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return train_study(tmp_path_factory.mktemp("studies") / "a study")


def test_page_shows_what_the_runs_recorded(study: Study, tmp_path: Path) -> None:
    page = Page(write_report([study.path], tmp_path / "pages" / "report.html"))
    trials = [row for row in page.rows if row and row[-1].startswith("trials/")]
    scores = {(row[0], float(row[1]), int(row[2])): row[3] for row in trials}
    assert scores == {trial: f"{100 * curve[-1]:.1f}" for trial, curve in recorded(study).items()}
    assert {path.resolve() for path in page.folders()} == {t.path.resolve() for t in study.trials()}
    summary = summarise(study.path)
    for row in cells(summary):
        assert list(row) in page.rows
    for text in [*sentences(summary), *assumptions(summary)]:
        assert text in page.text


def test_page_is_self_contained(study: Study, tmp_path: Path) -> None:
    page = Page(write_report([study.path], tmp_path / "report.html"))
    assert all(load.startswith("data:") for load in page.loads)
    assert not {"link", "iframe", "object", "base"} & set(page.tags)
    assert page.scripts.count("Plotly.newPlot(") - page.scripts.count("Plotly.newPlot(t") >= 2
    # The library says its version once in its banner.
    assert page.scripts.count("plotly.js v") == 1


def test_figures_hold_the_numbers_of_the_runs(study: Study, tmp_path: Path) -> None:
    curves, rates = drawn_figures(write_report([study.path], tmp_path / "report.html"))
    runs = recorded(study)
    for arm in study.arms:
        means = {lr: np.mean([runs[arm, lr, seed][-1] for seed in study.seeds]) for lr in study.lrs}
        best = min(lr for lr in study.lrs if means[lr] == max(means.values()))
        both = 100 * np.array([runs[arm, best, seed] for seed in study.seeds])
        (line,) = [t for t in curves if t["name"] == arm and t["mode"] == "lines+markers"]
        assert line["x"] == [0, 1, 2]
        assert line["y"] == pytest.approx(both.mean(0))
        assert all("n = 2" in words for words in line["hovertext"])
        (band,) = [t for t in curves if t["name"] == arm and t.get("fill") == "toself"]
        half = scipy.stats.t.ppf(0.975, 1) * both.std(0, ddof=1) / np.sqrt(2)
        highs, lows = np.minimum(both.mean(0) + half, 100), np.maximum(both.mean(0) - half, 0)
        assert band["y"] == pytest.approx([*highs, *lows[::-1]])
        dots = [t for t in rates if t["name"] == arm and t["mode"] == "markers" and len(t["x"]) == 4]
        expected = sorted(100 * curve[-1] for (name, _, _), curve in runs.items() if name == arm)
        assert sorted(dots[0]["y"]) == pytest.approx(expected)


def drawn_figures(path: Path) -> list[list[dict]]:
    """Return the traces of every figure, as the page's own script passes them on."""
    decoder, figures, text = json.JSONDecoder(), [], path.read_text()
    for number in range(1, 100):
        start = text.find(f'"plot-{number}",')
        if start < 0:
            return figures
        figures.append(decoder.raw_decode(text, text.index("[", start))[0])
    raise AssertionError("too many figures")


def test_diverged_failed_and_unfinished_runs_are_shown(tmp_path: Path) -> None:
    study = plan_study(RECIPE, ["default", "mimetic"], [1e-3, 1e-2], [0, 1], tmp_path / "study")

    for trial in study.trials():
        if (trial.arm, trial.lr, trial.seed) == ("mimetic", 1e-2, 0):
            trial.path.mkdir(parents=True)
            (trial.path / FAILURE).write_text("RuntimeError: <script>alert(1)</script> went wrong\nsecond line")
        elif (trial.arm, trial.lr, trial.seed) != ("default", 1e-2, 1):
            fabricate(trial.recipe, trial.path, None if trial.lr == 1e-2 else usual_score(trial.recipe))
    path = write_report([study.path], tmp_path / "report.html")
    page = Page(path)
    assert "<script>alert(1)" not in path.read_text()
    (failed,) = [row for row in page.rows if len(row) == 7 and row[4].startswith("failed")]
    assert failed[4] == "failed: RuntimeError: <script>alert(1)</script> went wrong"
    assert failed[:4] == ["mimetic", "0.01", "0", "–"]
    assert "failed: mimetic lr=0.01 seed=0: RuntimeError" in page.text
    states = [row[4] for row in page.rows if len(row) == 7 and row[-1].startswith("trials/")]
    assert sorted(state.partition(":")[0] for state in states).count("diverged") == 2
    assert "unfinished" in states
    assert all(folder.exists() for folder in page.folders())
    crosses = [t for t in drawn_figures(path)[1] if t.get("marker", {}).get("symbol") == "x-thin"]
    assert sorted(len(t.get("x", [])) for t in crosses) == [1, 1]


def test_names_from_files_are_escaped(study: Study, tmp_path: Path) -> None:
    copy = shutil.copytree(study.path, tmp_path / "study")
    plan = json.loads((copy / "study.json").read_text())
    del plan["digest"]  # as in the oldest studies
    # An arm is the name of a folder, which a tag cannot be; an entity can.
    plan["arms"] = {"default": plan["arms"]["default"], "a&lt;b": {"init": "<img src=x>"}}
    (copy / "study.json").write_text(json.dumps(plan))
    path = write_report([copy], tmp_path / "report.html")
    page = Page(path)
    assert "<img src=x>" not in path.read_text()
    assert "a&lt;b" in page.text


def test_study_without_a_finished_run_still_has_a_page(tmp_path: Path) -> None:
    study = plan_study(RECIPE, ["default", "mimetic"], [1e-3], [0], tmp_path / "study")
    page = Page(write_report([study.path], tmp_path / "report.html"))
    assert "0 of 2 runs finished" in page.text
    assert "plotly.js v" not in page.scripts


def test_folder_that_is_neither_is_named_and_nothing_is_written(study: Study, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(EspalierError, match="other is neither a study"):
        write_report([study.path, tmp_path / "other"], tmp_path / "new" / "report.html")
    with pytest.raises(EspalierError, match="at least one"):
        write_report([], tmp_path / "new" / "report.html")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "shown"),
    [("digits_vit", ["Attention maps", "Products of attention weights"]), ("digits_convmixer", ["Depthwise filters"])],
)
def test_trained_run_shows_its_record_and_its_weights(name: str, shown: list[str], tmp_path: Path) -> None:
    recipe = replace(
        get_recipe(name), epochs=1, init="structured", data_args={"train_limit": 128, "test_limit": 50}, threads=1
    )
    train(recipe, tmp_path / "a run", progress=False)
    page = Page(write_report([tmp_path / "a run"], tmp_path / "report.html"))
    for title in [*shown, "Curves", "Structure written", "Recipe", "Environment"]:
        assert title in page.text
    result = json.loads((tmp_path / "a run" / "result.json").read_text())
    assert f"test/accuracy {result['score']:.4g}" in page.text
    assert ["epochs", "1", str(get_recipe(name).epochs)] in page.rows
    assert ["init", "'structured'", "'default'"] in page.rows
    assert {"start", "end"} <= {row[0] for row in page.rows}
    assert page.tags.count("img") > 8
    assert (tmp_path / "a run") in page.folders()


@pytest.mark.parametrize("size", [1e-9, 1e-5, 1.0, 1e7])
def test_scores_of_any_size_fill_their_figures(tmp_path: Path, size: float) -> None:
    def curve(arm: str, lr: float, seed: int, folder: Path) -> list[tuple[int, float]]:
        end = math.nan if lr == 1.0 else 3.0 * size
        return [(0, 2.0 * size), (1, 2.25 * size + 0.125 * size * seed), (2, end)]

    summary = espalier.compare(curve, arms=["a"], lrs=[0.1, 1.0], seeds=2, out=tmp_path, workers=0)
    curves, rates = (part(summary, Context(tmp_path, {"a": "#112233"})) for part in (learning_curves, score_over_rate))
    low, high = curves.parts[0].figure.layout.yaxis.range
    ends = [end for point in summary.arms[0].curve for end in (point.score.low, point.score.high)]
    assert 0.9 < (max(ends) - min(ends)) / (high - low) < 1
    crosses = rates.parts[0].figure.data[1].y
    assert crosses == pytest.approx([3.0 * size] * 2, rel=0.01)  # just below what has a score
    assert crosses[0] < 3.0 * size
