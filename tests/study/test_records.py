"""Records: small lines that come back as they were, merged in any order by any number of writers, never averaged."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import stat
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.cli.main import main
from espalier.errors import EspalierError
from espalier.recipes import get_recipe
from espalier.recipes.validation import MACHINE_FIELDS
from espalier.study import Trial, launch, load_study, plan_study, summarise, text_table
from espalier.study.record import MAX_BYTES, Record, recipe_digest, record_from_line, record_run
from espalier.study.records import add_records, by_trial, combine, read_records
from espalier.train import load_run
from fabricated_runs import fabricate, fabricate_trial, fabricate_usual

RECIPE = replace(get_recipe("digits_vit"), epochs=4, warmup_epochs=0.0)
ARMS, LRS, SEEDS = ["default", "mimetic"], [1e-4, 1e-3], [0, 1, 2]

finite = st.floats(-1e6, 1e6).map(lambda value: round(value, 6))
times = st.floats(0, 1e6).map(lambda value: round(value, 6))
words = st.text(st.characters(exclude_characters="\0"), min_size=1, max_size=12)
made_records = st.builds(
    Record,
    study=words,
    arm=words,
    lr=st.floats(1e-6, 1.0),
    seed=st.integers(0, 9),
    digest=words,
    metric=words,
    score=finite,
    diverged=st.just(False),
    epochs=st.integers(0, 999),
    steps=st.integers(0, 10**6),
    seconds=times,
    step_seconds=st.none() | times.filter(bool),
    curve=st.lists(
        st.tuples(times, st.integers(0, 10**6), times, finite), max_size=60, unique_by=lambda row: row[1]
    ).map(lambda rows: tuple(sorted(rows, key=lambda row: row[1]))),
    extra=st.dictionaries(words, finite, max_size=4),
    versions=st.dictionaries(words, words, max_size=3),
    commit=words,
    processor=words,
    date=words,
)


def a_record(seed: int = 0, score: float | None = 0.5, **changes: object) -> Record:
    """Return a plain record of the study ``s``."""
    curve = ((1, 2, 3.0, 0.5),)
    plain = Record("s", "default", 1e-3, seed, f"d{seed}", "acc", score, score is None, 1, 2, 3.0, 0.1, curve)
    return replace(plain, **changes)  # type: ignore[arg-type]


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A study folder in which every trial is finished."""
    folder = tmp_path / "study"
    launch(plan_study(RECIPE, ARMS, LRS, SEEDS, folder), workers=0, run=fabricate_trial)
    return folder


@given(made_records)
def test_a_line_is_small_and_comes_back(record: Record) -> None:
    line = record.line()
    assert len(line.encode()) <= MAX_BYTES
    assert line.endswith("\n")
    assert line.count("\n") == 1
    back = record_from_line(line)
    assert replace(back, curve=()) == replace(record, curve=())
    assert set(back.curve) <= set(record.curve)
    if record.curve:
        assert (back.curve[0], back.curve[-1]) == (record.curve[0], record.curve[-1])
    assert back.line() == line


def test_a_record_that_cannot_be_small_is_refused() -> None:
    with pytest.raises(EspalierError, match="keep fewer figures in extra"):
        a_record(extra={f"figure {index}": 0.123456 for index in range(99)}).line()


@given(st.text(max_size=80) | made_records.map(lambda record: record.line()[:-2]))
def test_what_is_no_record_is_named_with_its_line(text: str) -> None:
    lines = [a_record().line().strip(), " ".join(text.split("\n")), a_record(1).line().strip()]
    with TemporaryDirectory() as folder:
        file = Path(folder) / "r.jsonl"
        file.write_text("\n".join(lines), encoding="utf-8", newline="")
        if not lines[1].strip():
            assert len(read_records(file)) == 2
            return
        with pytest.raises(EspalierError, match=r"r\.jsonl: line 2 is no record"):
            read_records(file)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"score": "0.5"}, "field 'score' is '0.5'"),
        ({"seed": True}, "field 'seed' is True"),
        ({"lr": 0}, "field 'lr' is 0"),
        ({"colour": 1}, "unknown field 'colour'"),
        ({"diverged": True}, "diverged is True and score is 0.5"),
        ({"curve": [[1, 2, 3]]}, "field 'curve'"),
        ({"extra": {"a": None}}, "field 'extra'"),
        ({"date": "2026\0"}, "field 'date' is '2026\\x00'"),
        ({"extra": {"a": True}}, "field 'extra'"),
        ({"curve": [[1, True, 3.0, 0.5]]}, "field 'curve'"),
        # What no trial can leave.
        ({"score": 10**400}, "field 'score' is 1000"),
        ({"lr": 10**400}, "field 'lr' is 1000"),
        ({"extra": {"a": 10**400}}, "field 'extra'"),
        ({"steps": 10**400}, "field 'steps'"),
        ({"step_seconds": 0.0}, "field 'step_seconds' is 0.0"),
        ({"seconds": -1.0}, "field 'seconds' is -1.0"),
        ({"curve": [[1, 2, -3.0, 0.5]]}, "field 'curve'"),
        ({"curve": [[1, 2, 3.0, 0.5], [2, 2, 4.0, 0.5]]}, "the steps of its curve do not increase"),
        ({"metric": "test/accuracy", "score": 7.5}, "score is 7.5, and 'test/accuracy' lies in [0, 1]"),
        ({"metric": "test/accuracy", "score": -0.1}, "score is -0.1"),
        ({"metric": "accuracy", "curve": [[1, 2, 3.0, 9.0]]}, "a score of its curve is 9"),
        ({"extra": {"other/accuracy": 1.5}}, "other/accuracy is 1.5"),
    ],
)
def test_a_field_that_does_not_fit_is_named(change: dict[str, object], said: str) -> None:
    values = json.loads(a_record().line())
    del values["check"]  # as the oldest lines are: whoever changes a line without it gets this far
    with pytest.raises(ValueError) as error:
        record_from_line(json.dumps({**values, **change}))
    assert said in str(error.value)
    del values["arm"]
    with pytest.raises(ValueError, match="field 'arm' is missing"):
        record_from_line(json.dumps(values))
    with pytest.raises(ValueError, match="NaN is not a finite number"):
        record_from_line(json.dumps({**values, "arm": "a", "score": float("nan")}))


def test_a_key_that_stands_in_a_line_twice_is_refused(tmp_path: Path) -> None:
    values = json.loads(a_record().line())
    del values["check"]
    line = json.dumps(values)
    (tmp_path / "r.jsonl").write_text(f'{line[:-1]}, "score": 0.75}}\n')
    with pytest.raises(EspalierError, match="line 1 is no record: 'score' stands there twice"):
        read_records(tmp_path / "r.jsonl")


def test_a_mark_of_byte_order_is_no_damage(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text(a_record().line(), encoding="utf-8-sig")
    assert read_records(tmp_path / "r.jsonl") == [a_record()]
    add_records([a_record(1)], tmp_path / "r.jsonl")
    assert read_records(tmp_path / "r.jsonl") == [a_record(), a_record(1)]


def test_scores_that_are_no_shares_may_be_of_any_size() -> None:
    record = a_record(score=-1.7e308, curve=((1, 2, 3.0, -7.5),), extra={"perplexity": 1e300}, metric="minus loss")
    assert record_from_line(record.line()) == record


@pytest.mark.parametrize("change", [{"lr": 5.0}, {"seed": 9}, {"metric": "other"}])
def test_a_record_of_a_trial_with_another_rate_seed_or_metric_is_refused_by_name(
    finished: Path, change: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    """Such a record has the digest of the trial: somebody edited it, and its score would count as another's."""
    records = list(load_study(finished).outcomes().values())
    elsewhere = finished.with_name("elsewhere")
    elsewhere.mkdir()
    (elsewhere / "study.json").write_bytes((finished / "study.json").read_bytes())
    add_records([replace(records[0], **change), *records[1:]], elsewhere / "records.jsonl")  # type: ignore[arg-type]
    ((name, value),) = change.items()
    with pytest.raises(EspalierError, match=f"records.jsonl: the record of default .* has {name} {value!r}"):
        summarise(elsewhere)
    assert main(["report", str(elsewhere), "--out", str(elsewhere / "page.html")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_scores_of_two_metrics_are_not_compared(finished: Path) -> None:
    records = list(load_study(finished).outcomes().values())
    elsewhere = finished.with_name("elsewhere")
    elsewhere.mkdir()
    (elsewhere / "study.json").write_bytes((finished / "study.json").read_bytes())
    add_records([replace(records[0], metric="val/accuracy"), *records[1:]], elsewhere / "records.jsonl")
    with pytest.raises(EspalierError, match=r"several metrics, 'val/accuracy' .* and 'test/accuracy'"):
        summarise(elsewhere)


@given(made_records, st.integers(0), st.integers(0, 6))
def test_a_flipped_bit_is_found(record: Record, place: int, bit: int) -> None:
    line = bytearray(record.line().encode())
    line[place % (len(line) - 1)] ^= 1 << bit
    with pytest.raises(ValueError):
        record_from_line(line.decode())


def test_digest_forgets_the_machine_and_nothing_else() -> None:
    machine = {"name": "other", "data_path": "/else", "threads": 3, "compile": True, "channels_last": True}
    machine |= {"eval_batch_size": 7, "checkpoint_every": 9, "logger": "csv"}
    assert machine.keys() == MACHINE_FIELDS
    assert recipe_digest(replace(RECIPE, **machine)) == recipe_digest(RECIPE)
    for change in ({"lr": 2e-3}, {"seed": 5}, {"epochs": 9}, {"init": "mimetic"}, {"model_args": {"depth": 1}}):
        assert recipe_digest(replace(RECIPE, **change)) != recipe_digest(RECIPE)
    here, there = (replace(RECIPE, init_args={"statistics": f"/{place}/s.safetensors"}) for place in ("a", "b/c"))
    assert recipe_digest(here) == recipe_digest(there)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["2026-01-01", "2026-01-02"])), max_size=8), st.randoms())
def test_merging_is_idempotent_and_forgets_the_order(made: list[tuple[int, str]], random: object) -> None:
    records = [a_record(seed, 0.1 * seed, date=date, commit=f"c{index}") for index, (seed, date) in enumerate(made)]
    once = combine(records)
    assert combine([*once, *records, *once]) == once
    random.shuffle(records)  # type: ignore[attr-defined]
    assert combine(records) == once
    half = len(records) // 2
    assert combine([*combine(records[half:]), *combine(records[:half])]) == once
    assert len(once) == len({seed for seed, _ in made})


def test_another_score_is_reported_and_nothing_is_written(tmp_path: Path) -> None:
    add_records([a_record(0, 0.5), a_record(1, 0.25)], tmp_path / "all.jsonl")
    before = (tmp_path / "all.jsonl").read_bytes()
    for other in (a_record(1, 0.26), a_record(1, None), a_record(1, 0.25, extra={"x": 1.0})):
        record = [replace(other, extra={"x": 2.0}), other] if other.extra else [other]
        with pytest.raises(EspalierError, match=r"contradict each other: s: default lr=0\.001 seed=1"):
            add_records(record, tmp_path / "all.jsonl")
        assert (tmp_path / "all.jsonl").read_bytes() == before
    add_records([a_record(1, 0.2500005)], tmp_path / "all.jsonl")  # within rounding
    assert [record.score for record in read_records(tmp_path / "all.jsonl")] == [0.5, 0.25]


@pytest.mark.parametrize("size", [1e-9, 1e-3, 1.0, 1e6, 1e300])
def test_scores_of_any_size_contradict_each_other_alike(size: float) -> None:
    assert len(combine([a_record(1, 3.0 * size), a_record(1, 3.000003 * size)])) == 1  # within seven digits
    for other in (3.0001 * size, -3.0 * size, 0.0):
        with pytest.raises(EspalierError, match="contradict each other"):
            combine([a_record(1, 3.0 * size), a_record(1, other)])


def test_a_trial_under_two_names_of_its_study_counts_once_or_is_refused_with_both() -> None:
    one, other = a_record(1, 0.25), replace(a_record(1, 0.25, extra={"x": 1.0}), study="other")
    assert by_trial([one, other]) == by_trial([other, one]) == {(one.arm, one.digest): other}
    with pytest.raises(EspalierError, match=r"contradict each other: other and s: default lr=0\.001 seed=1: score"):
        by_trial([one, replace(other, score=0.5)])


def _write(path: str, first: int) -> None:
    for seed in range(first, first + 15):
        add_records([a_record(seed, 0.1)], path)


def test_two_writers_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_write, args=(str(tmp_path / "all.jsonl"), first)) for first in (0, 10)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert [record.seed for record in read_records(tmp_path / "all.jsonl")] == list(range(25))


def test_two_machines_make_one_table(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    trials = load_study(finished).trials()
    for half, name in ((trials[::2], "one"), (trials[1::2], "two")):
        plan_study(RECIPE, ARMS, LRS, SEEDS, tmp_path / name / "study")
        for trial in half:
            fabricate_usual(trial.recipe, tmp_path / name / "study" / trial.path.relative_to(finished))
        export = ["records", "export", str(tmp_path / name / "study"), "--to", str(tmp_path / f"{name}.jsonl")]
        assert main(export) == 0
    empty = tmp_path / "empty"
    plan_study(RECIPE, ARMS, LRS, SEEDS, empty)
    assert "no paired runs" in _table(empty)
    assert main(["records", "merge", *(str(tmp_path / f"{n}.jsonl") for n in ("two", "one")), "--to",
                 str(empty / "records.jsonl")]) == 0  # fmt: skip
    assert f"{len(trials)} trials" in capsys.readouterr().out
    assert _table(empty) == _table(finished)


def test_a_trial_with_a_record_is_finished(finished: Path, tmp_path: Path) -> None:
    records = list(load_study(finished).outcomes().values())
    there = plan_study(RECIPE, ARMS, LRS, SEEDS, tmp_path / "there")
    add_records(records[:5], tmp_path / "there" / "records.jsonl")
    ran: list[Path] = []

    def run(trial: Trial) -> None:
        ran.append(trial.path)
        fabricate_trial(trial)

    launch(load_study(there.path), workers=0, run=run)
    assert len(ran) == len(records) - 5
    assert _table(there.path) == _table(finished)


def test_a_line_and_a_run_folder_that_contradict_each_other_are_reported(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = list(load_study(finished).outcomes().values())
    add_records(records, finished / "records.jsonl")
    before = _table(finished)  # they agree
    file = finished / "records.jsonl"
    kept = [replace(record, score=0.0) if record.seed == 1 else record for record in records]
    file.write_text("".join(record.line() for record in kept))
    wrong = [record for record in records if record.seed == 1]
    with pytest.raises(EspalierError, match=f"^{len(wrong)} trials have .* contradict each other: .*score 0 "):
        load_study(finished).outcomes()
    trial = next(trial for trial in load_study(finished).trials() if trial.seed == 1)
    with pytest.raises(EspalierError, match=r"contradict each other: .*: delete the line, or the run folder, of each"):
        trial.outcome("study")
    assert main(["report", str(finished), "--out", str(finished / "page.html")]) == 2
    assert "contradict each other" in capsys.readouterr().err
    assert not (finished / "page.html").exists()
    for each in load_study(finished).trials():
        if each.seed == 1:
            shutil.rmtree(each.path)
    assert _table(finished) != before  # the lines that are left count


def test_diverged_and_extra_figures_travel(tmp_path: Path) -> None:
    fabricate(RECIPE, tmp_path / "bad", None)
    record = record_run(load_run(tmp_path / "bad"), "s", "default")
    assert (record.score, record.diverged) == (None, True)
    fabricate(RECIPE, tmp_path / "good", 0.7)
    record = record_run(load_run(tmp_path / "good"), "s", "default", {"test/certified": 0.1234567})
    assert record_from_line(record.line()).extra == {"test/certified": 0.123457}
    assert record.curve[-1] == (4, 80, 0.8, 0.7)
    with pytest.raises(EspalierError, match="not finite"):
        record_run(load_run(tmp_path / "good"), "s", "default", {"x": float("nan")})


def test_a_damaged_file_ends_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a.jsonl").write_text(a_record().line() + a_record(1).line()[:40])
    assert main(["records", "merge", str(tmp_path / "a.jsonl"), "--to", str(tmp_path / "b.jsonl")]) == 2
    error = capsys.readouterr().err
    assert "a.jsonl: line 2 is no record: not JSON" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "b.jsonl").exists()


def _table(folder: Path) -> str:
    return text_table(summarise(folder))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("as_source", [True, False])
def test_a_pipe_is_no_file_of_records(tmp_path: Path, as_source: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Opening one waits for whoever writes to it, which may be nobody."""
    file, pipe = tmp_path / "r.jsonl", tmp_path / "pipe"
    add_records([a_record()], file)
    os.mkfifo(pipe)
    paths = [pipe, file] if as_source else [file, pipe]
    assert main(["records", "merge", str(paths[0]), "--to", str(paths[1])]) == 2
    assert str(pipe) in capsys.readouterr().err
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert read_records(file) == [a_record()]
