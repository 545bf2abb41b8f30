"""Trials on other data are no trials of a study, wherever they ran and however they came here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import espalier
from espalier.cli.main import main
from espalier.data import build_source
from espalier.data.source import data_digest
from espalier.errors import EspalierError
from espalier.recipes import Recipe, get_recipe
from espalier.study import add_records, load_study, read_records, summarise
from espalier.study.record import MAX_BYTES, Record, record_from_line
from espalier.study.records import by_trial, combine

RECIPE = replace(get_recipe("digits_vit"), epochs=1, batch_size=4, warmup_epochs=0.0, threads=1)
OPTIONS = {"arms": ["default", "mimetic"], "lrs": [1e-3], "workers": 0}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPALIER_CACHE", str(tmp_path / "cache"))


def _pictures(root: Path, blue: int) -> Recipe:
    """Return a recipe of ten pictures in two classes, of the same names and sizes whatever ``blue`` is."""
    for label in range(2):
        (root / f"class{label}").mkdir(parents=True)
        for index in range(5):
            Image.new("RGB", (8, 8), (40 * index, 200 * label, blue)).save(root / f"class{label}" / f"{index}.bmp")
    return replace(RECIPE, dataset="folder", data_path=str(root), data_args={"size": 8})


def test_records_of_trials_on_other_images_are_not_trials_of_this_study(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two machines, two folders of images that their owners took for the same."""
    one, two = _pictures(tmp_path / "m1/pictures", 0), _pictures(tmp_path / "m2/pictures", 99)
    espalier.compare(one, out=tmp_path / "m1/study", seeds=1, **OPTIONS)
    assert main(["records", "export", str(tmp_path / "m1/study"), "--to", str(tmp_path / "r.jsonl")]) == 0
    records = read_records(tmp_path / "r.jsonl")
    assert {record.data for record in records} == {data_digest(build_source(one))}
    assert data_digest(build_source(one)) != data_digest(build_source(two))
    assert all(len(line) < MAX_BYTES for line in (tmp_path / "r.jsonl").read_text().splitlines())

    # Not beside new trials, and nothing is written or trained.
    there = tmp_path / "m2/study"
    there.mkdir()
    (there / "study.json").write_bytes((tmp_path / "m1/study/study.json").read_bytes())
    add_records(records, there / "records.jsonl")
    elsewhere = replace(two, data_path=one.data_path)
    moved = tmp_path / "m1/pictures"
    moved.rename(tmp_path / "m1/were")
    (tmp_path / "m2/pictures").rename(moved)
    before = (there / "study.json").read_bytes()
    with pytest.raises(EspalierError, match=r"records\.jsonl: the record of default lr=0\.001 seed=0 is of other data"):
        espalier.compare(elsewhere, out=there, seeds=2, **OPTIONS)
    assert (there / "study.json").read_bytes() == before
    assert not (there / "trials").exists()

    # Nor beside those that ran here before the records came.
    (there / "records.jsonl").unlink()
    espalier.compare(elsewhere, out=there, seeds=2, **OPTIONS)
    mine = load_study(there).outcomes()
    with pytest.raises(EspalierError, match=r"contradict each other: .* data [0-9a-f]{16} and [0-9a-f]{16}"):
        add_records([*mine.values(), *(replace(record, study="study") for record in records)], tmp_path / "both.jsonl")
    kept = [record for record in records if record.arm == "mimetic"]
    for path, record in mine.items():
        if record.seed == 0 and record.arm == "mimetic":
            (path / "result.json").unlink()  # this one has its record from the other machine
    add_records(kept, there / "records.jsonl")
    with pytest.raises(EspalierError, match=r"holds trials on different data, default .* which cannot be compared"):
        summarise(there)
    capsys.readouterr()
    assert main(["report", str(there), "--out", str(tmp_path / "page.html")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_study_on_two_machines_with_one_set_of_images_is_one_study(tmp_path: Path) -> None:
    recipes = [_pictures(tmp_path / name / "pictures", 7) for name in ("m1", "m2")]
    espalier.compare(recipes[0], out=tmp_path / "m1/study", seeds=1, **OPTIONS)
    first = load_study(tmp_path / "m1/study").outcomes().values()
    espalier.compare(recipes[1], out=tmp_path / "m2/study", seeds=[1], **OPTIONS)
    add_records(first, tmp_path / "m2/study/records.jsonl")
    found = espalier.compare(recipes[1], out=tmp_path / "m2/study", seeds=2, **OPTIONS)
    assert [arm.finished for arm in found.arms] == [2, 2]
    assert len({record.data for record in found.records.values()}) == 1


@pytest.mark.parametrize("storage", ["memory", "mapped", "stream"])
def test_what_a_record_says_of_data_does_not_depend_on_their_place(tmp_path: Path, storage: str) -> None:
    said = []
    for name, blue in (("a", 7), ("b", 7), ("c", 8)):
        recipe = _pictures(tmp_path / name, blue)
        recipe = replace(recipe, data_args={**recipe.data_args, "storage": storage})
        said.append(data_digest(build_source(recipe)))
    if storage == "stream":  # which holds place and times of the files
        assert said == [""] * 3
    else:
        assert said[0] == said[1] != said[2]
        assert all(len(each) == 16 for each in said)


def _record(seed: int = 0, **changes: object) -> Record:
    plain = Record("s", "a", 1e-3, seed, f"d{seed}", "acc", 0.5, False, 1, 2, 3.0, 0.1, ((1.0, 2, 3.0, 0.5),))
    return replace(plain, **changes)  # type: ignore[arg-type]


def test_lines_that_do_not_say_their_data_are_read_and_written_as_they_were() -> None:
    old = _record()
    assert "data" not in json.loads(old.line())
    assert record_from_line(old.line()) == old
    new = _record(data="0123456789abcdef")
    assert record_from_line(new.line()) == new
    values = json.loads(new.line())
    del values["check"]
    with pytest.raises(ValueError, match="field 'data' is '0123'"):
        record_from_line(json.dumps({**values, "data": "0123"}))


def test_what_is_unknown_contradicts_nothing_and_forgets_nothing() -> None:
    unknown = _record(extra={"more": 1.0})
    one, other = _record(data="0" * 16), _record(data="1" * 16)
    kept = combine([unknown, one])
    assert kept == combine([one, unknown]) == combine([*kept, unknown, one]) == [replace(unknown, data="0" * 16)]
    for records in ([*kept, other], [other, unknown, one]):
        with pytest.raises(EspalierError, match=r"data 0{16} and 1{16}"):
            by_trial(records)
