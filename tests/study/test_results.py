"""The pages of results: what is committed is what the records give, and verdicts follow their rule."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from espalier.errors import EspalierError
from espalier.study.record import Record, record_run
from espalier.study.records import add_records, read_records
from espalier.study.statistics import Interval
from espalier.train import load_run
from experiments import filters, recall, robustness
from experiments.claims import CLAIMS
from experiments.evidence import CONTRADICTED, NOT_RUN, NOT_SHOWN, SHOWN, Results, better, sooner, verdict, weakest
from experiments.experiment import Experiment
from experiments.order import ORDER
from experiments.pages import PAGES, index_text, page_text
from experiments.results import collect, differences, generated, write
from experiments.scheduler import COMMITTED
from fabricated_runs import fabricate


def made_up(experiment: Experiment, folder: Path, offset: float, seeds: int = 3) -> list[Record]:
    """Return records of an experiment in which every arm but the first is ``offset`` better, give or take a little."""
    records = []
    for trial in replace(experiment, seeds=seeds, extend=False, measure=None).first(folder).trials():
        path = folder / experiment.name / trial.arm / f"{trial.lr:g}-{trial.seed}"
        baseline = trial.arm == next(iter(experiment.arms))
        score = 0.5 + 0.01 * trial.seed + (0.0 if baseline else offset + 0.002 * (trial.seed % 3))
        fabricate(trial.recipe, path, score)
        run = load_run(path)
        extra = {name: score / 2 for name in ("test_2x/accuracy", "test_4x/accuracy", experiment.metric) if name}
        records.append(record_run(run, experiment.name, trial.arm, extra))
    return records


def test_committed_pages_are_what_the_records_give() -> None:
    assert not differences(generated(), COMMITTED.parent), "run make results"


def test_every_experiment_has_a_page_and_every_page_is_queued() -> None:
    shown = [experiment.name for page in PAGES for experiment in page.experiments]
    assert len(set(shown)) == len(shown)
    assert set(shown) == {experiment.name for experiment in ORDER}
    assert {experiment.name for claim in CLAIMS for experiment in claim.experiments} <= set(shown)
    assert {claim.page for claim in CLAIMS} <= {"", "measured.md", *(page.file for page in PAGES)}
    assert len({claim.key for claim in CLAIMS}) == len(CLAIMS)


def test_verdicts_follow_the_interval_alone() -> None:
    nan = float("nan")
    assert verdict(Interval(0.2, 0.1, 0.3, 3)) == SHOWN
    assert verdict(Interval(0.2, -0.1, 0.5, 3)) == NOT_SHOWN
    assert verdict(Interval(0.2, 0.0, 0.4, 9)) == NOT_SHOWN
    assert verdict(Interval(-0.2, -0.3, -0.1, 3)) == CONTRADICTED
    assert verdict(Interval(0.2, 0.1, 0.3, 2)) == NOT_RUN
    assert verdict(Interval(0.2, nan, nan, 1)) == verdict(None) == NOT_RUN


@pytest.mark.parametrize(("offset", "expected"), [(0.1, SHOWN), (-0.1, CONTRADICTED), (-0.002, NOT_SHOWN)])
def test_a_claim_is_judged_from_records(offset: float, expected: str, tmp_path: Path) -> None:
    results = Results(made_up(recall.TEXT, tmp_path, offset))
    evidence = better(recall.TEXT, "mimetic-ssm", "default")(results)
    assert (evidence.verdict, evidence.n) == (expected, 3)
    said = float(evidence.text.split(": ")[1].split()[0].replace("−", "-"))
    assert said == pytest.approx(100 * (offset + 0.002), abs=0.051)
    placed = better(recall.TEXT, "mimetic-ssm", "default", "text")(results)
    assert placed.text == evidence.text.replace("over default:", "over default, text:")
    missing = better(recall.LAYERS, "mimetic-ssm", "default")
    assert weakest([better(recall.TEXT, "mimetic-ssm", "default"), missing])(results).verdict == NOT_RUN


def test_the_figure_that_is_compared_chooses_the_rates(tmp_path: Path) -> None:
    experiment = robustness.EQUAL_EPOCHS
    results = Results(made_up(experiment, tmp_path, -0.1))
    summary = results.summary(experiment)
    assert summary.metric == "36/255 certified accuracy"
    assert summary.arms[0].score.mean == pytest.approx(0.255)
    assert better(experiment, "cayley", "aoc")(results).verdict == SHOWN
    plain = Results(results.records).summary(replace(experiment, metric="test/accuracy"))
    assert plain.arms[0].score.mean == pytest.approx(0.51)


def test_epochs_saved_by_hand(tmp_path: Path) -> None:
    # Both climb in a line from 0.1; the arm to s + 0.4, the baseline to s: it is passed at (s − 0.1) / (s + 0.3).
    records = made_up(replace(recall.TEXT, name="x"), tmp_path, 0.4)
    evidence = sooner(replace(recall.TEXT, name="x"), "mimetic-ssm", "default")(Results(records))
    savings = [1 - (s - 0.1) / (s + 0.3 + extra) for s, extra in ((0.5, 0.0), (0.51, 0.002), (0.52, 0.004))]
    assert f"share of the epochs saved: +{100 * sum(savings) / 3:.1f} [" in evidence.text
    assert (evidence.verdict, evidence.n) == (SHOWN, 3)


def test_pages_of_made_up_records(tmp_path: Path) -> None:
    records = [
        record
        for experiment in (recall.WINDOW, recall.TEXT, filters.WORTH[0], robustness.EQUAL_EPOCHS)
        for record in made_up(experiment, tmp_path, 0.3)
    ]
    results = Results(records)
    for page in PAGES:
        text, pictures = page_text(page, results)
        assert text.splitlines()[4].startswith("**Finding:**")
        assert set(re.findall(r"pictures/([\w-]+\.svg)", text)) == set(pictures)
        for picture in pictures.values():
            assert picture.count("<svg") == picture.count("</svg>") == 1
        for low, high in re.findall(r"\[([−+]?[\d.]+), ([−+]?[\d.]+)\]", text):
            assert -100 <= float(low.replace("−", "-")) <= float(high.replace("−", "-")) <= 100
    index = index_text(results)
    (row,) = [line for line in index.splitlines() if line.startswith("| S1.1 ")]
    assert "*shown* | 3 | mimetic-ssm over default: +30.2 [+" in row
    (row,) = [line for line in index.splitlines() if line.startswith("| S3.4 ")]
    assert "*not run at this scale*" in row  # the ConvNeXt is missing
    assert index.count("\n| ") == len(CLAIMS) + 2


def test_records_in_two_folders_give_the_pages_of_their_sum(tmp_path: Path) -> None:
    records = made_up(recall.TEXT, tmp_path, 0.2)
    for name, half in (("one", records[::2]), ("two", records[1::2])):
        add_records(half, tmp_path / name / "records" / "recall-text.jsonl")
    committed = tmp_path / "committed"
    assert collect(tmp_path / "two", committed) == len(records) // 2
    assert collect(tmp_path / "one", committed) == collect(tmp_path / "two", committed) == len(records)
    assert len(read_records(committed / "recall-text.jsonl")) == len(records)
    both = generated(committed)
    add_records(records, tmp_path / "whole" / "recall-text.jsonl")
    assert generated(tmp_path / "whole") == both
    write(both, tmp_path / "pages")
    assert not differences(both, tmp_path / "pages")
    (tmp_path / "pages" / "pictures" / "old.svg").write_text("<svg/>")
    (tmp_path / "pages" / "index.md").write_text("edited by hand")
    assert differences(both, tmp_path / "pages") == ["index.md", "pictures/old.svg"]
    with pytest.raises(EspalierError, match="no file of records"):
        collect(tmp_path / "nothing", committed)
