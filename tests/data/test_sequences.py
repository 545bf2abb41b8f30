"""Token sources: batches that depend on (seed, epoch, step) alone, tests that depend on nothing, text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from espalier.data import GeneratedSource, Source, TextSource, build_source
from espalier.data.source import IGNORED
from espalier.errors import EspalierError
from espalier.recipes.base import Recipe
from reference.recall_reference import solve_mqar, solve_ngram, solve_string

TASKS: dict[str, dict[str, Any]] = {
    "copying": {"vocab_size": 12, "length": 7},
    "sorting": {"vocab_size": 12, "length": 7},
    "ngram_lookup": {"vocab_size": 12, "length": 7},
    "mqar": {"vocab_size": 32, "length": 16, "pairs": 3},
}
COUNTS = {"steps_per_epoch": 3, "eval_examples": 10}
TEXT = "".join(chr(97 + (i * i + i // 7) % 23) for i in range(1000))


def generated(name: str, **changes: Any) -> GeneratedSource:
    source = build_source(Recipe(name="r", dataset=name, data_args={**TASKS[name], **COUNTS, **changes}))
    assert isinstance(source, GeneratedSource)
    return source


@pytest.mark.parametrize("name", TASKS)
def test_batches_are_a_function_of_seed_epoch_and_step(name: str) -> None:
    one, two = generated(name), generated(name)
    assert isinstance(one, Source)
    list(two.eval_batches("test", 4))  # what else was asked for does not matter
    seen = []
    for key in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]:
        inputs, targets = one.train_batch(*key, 4)
        again = two.train_batch(*key, 4)
        assert torch.equal(inputs, again[0])
        assert torch.equal(targets, again[1])
        seen.append(tuple(inputs.flatten().tolist()))
    assert len(set(seen)) == 4
    assert one.steps_per_epoch(4) == one.steps_per_epoch(400) == 3
    with pytest.raises(IndexError):
        one.train_batch(0, 0, 3, 4)


@pytest.mark.parametrize("name", TASKS)
def test_evaluation_splits_are_fixed_and_do_not_depend_on_the_batch_size(name: str) -> None:
    source = generated(name)
    assert source.eval_splits == ("test", "test_2x", "test_4x")
    for split, factor in zip(source.eval_splits, (1, 2, 4), strict=True):
        whole = list(source.eval_batches(split, 10))
        parts = list(source.eval_batches(split, 3))
        assert len(whole) == 1
        assert [len(inputs) for inputs, _ in parts] == [3, 3, 3, 1]
        assert torch.equal(torch.cat([inputs for inputs, _ in parts]), whole[0][0])
        assert torch.equal(torch.cat([targets for _, targets in parts]), whole[0][1])
        again = source.examples(factor * source.length, 10)
        assert torch.equal(again[0], whole[0][0])
        assert torch.equal(again[1], whole[0][1])
        if name in ("copying", "sorting"):  # exactly so long, where training lengths vary
            assert ((whole[0][1] != IGNORED).sum(1) == 7 * factor + 1).all()
    with pytest.raises(EspalierError, match="unknown split 'train'"):
        next(source.eval_batches("train", 4))


def test_sources_pose_their_tasks() -> None:
    rows: dict[str, tuple[list[int], list[int]]] = {}
    for name, changes in [("copying", {"order": "reverse"}), ("sorting", {}), ("ngram_lookup", {}), ("mqar", {})]:
        source = generated(name, **changes)
        inputs, targets = source.train_batch(0, 0, 0, 4)
        rows[name] = inputs[0].tolist(), targets[0].tolist()
        assert source.model_args == {"vocab_size": TASKS[name]["vocab_size"]}
    wanted = {name: [(i, t) for i, t in enumerate(targets) if t != IGNORED] for name, (_, targets) in rows.items()}
    assert wanted["copying"] == solve_string(rows["copying"][0], "reverse")
    assert wanted["sorting"] == solve_string(rows["sorting"][0], "sorted")
    assert wanted["ngram_lookup"] == solve_ngram(rows["ngram_lookup"][0], 2, 1, "suffix")
    assert wanted["mqar"] == solve_mqar(rows["mqar"][0], 3, [place for place, _ in wanted["mqar"]])


def test_training_does_not_show_the_test() -> None:
    source = generated("copying")
    test = {tuple(row) for row in next(source.eval_batches("test", 10))[0].tolist()}
    trained = {
        tuple(row)
        for seed in range(20)
        for step in range(3)
        for row in source.train_batch(seed, 0, step, 64)[0].tolist()
    }
    assert len(test) == 10
    assert not test & trained


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("mqar", {"vocab_size": 6}, "vocab_size 6 for 3 pairs"),
        ("mqar", {"length": 10}, "length 10 is too short for 3 pairs"),
        ("mqar", {"pairs": None, "length": 20}, "give pairs, at most 5"),
        ("copying", {"vocab_size": 2}, "leaves no symbol"),
        ("copying", {"eval_examples": 0}, "eval_examples is 0"),
        ("copying", {"steps_per_epoch": 2.5}, "steps_per_epoch is 2.5"),
        ("copying", {"lenght": 5}, "did you mean 'length'"),
        ("copying", {"order": 3}, "unknown order '3'"),
        ("ngram_lookup", {"side": None}, "unknown side 'None'"),
        ("ngram_lookup", {"length": "7"}, "length is '7'"),
        ("mqar", {"length": 16.0}, "length is 16.0"),
        ("mqar", {"length": (16,), "pairs": None}, r"length is \(16,\)"),
        ("mqar", {"vocab_size": "32"}, "vocab_size is '32'"),
        ("mqar", {"power": "x"}, "power is 'x'"),
        ("sorting", {"order": "forward"}, "unknown argument of dataset 'sorting' 'order'"),
    ],
)
def test_bad_arguments_are_one_line(name: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(EspalierError, match=words):
        generated(name, **changes)


def text_of(source: TextSource, tokens: torch.Tensor) -> str:
    return "".join(source.characters[token] for token in tokens.tolist())


def test_text_windows_are_the_text() -> None:
    source = TextSource(TEXT, 16)
    assert isinstance(source, Source)
    assert source.characters == "".join(sorted(set(TEXT)))
    assert source.model_args == {"vocab_size": len(set(TEXT))}
    train, test = TEXT[:900], TEXT[900:]
    assert source.steps_per_epoch(4) == 900 // 64
    places = set()
    for step in range(14):
        inputs, targets = source.train_batch(3, 1, step, 4)
        for one, two in zip(inputs, targets, strict=True):
            window = text_of(source, one) + text_of(source, two)[-1]
            assert text_of(source, two) == window[1:]
            assert window in train  # never beyond the first nine tenths
            places.add(train.index(window))
    assert len(places) > 30
    batches = list(source.eval_batches("test", 4))
    read = "".join(text_of(source, row) for inputs, _ in batches for row in inputs)
    following = "".join(text_of(source, row) for _, targets in batches for row in targets)
    assert read == test[:96]
    assert following == test[1:97]
    again = source.train_batch(3, 1, 13, 4)
    assert torch.equal(again[0], inputs)
    with pytest.raises(IndexError):
        source.train_batch(0, 0, 14, 4)
    with pytest.raises(EspalierError, match="unknown split"):
        next(source.eval_batches("test_2x", 4))


def test_every_training_window_can_be_drawn() -> None:
    text = "".join(map(chr, range(97, 137)))
    source = TextSource(text, 2, steps_per_epoch=40)
    drawn = {text_of(source, row) for step in range(40) for row in source.train_batch(0, 0, step, 16)[0]}
    assert drawn == {text[i : i + 2] for i in range(34)}  # its target, 35, is the last of the first nine tenths


def test_text_comes_from_a_file_or_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tinyshakespeare").mkdir()
    (tmp_path / "tinyshakespeare" / "input.txt").write_text(TEXT)
    (tmp_path / "own.txt").write_text("é" + TEXT)
    monkeypatch.setenv("ESPALIER_DATA", str(tmp_path))
    arguments = {"length": 8, "eval_examples": 5, "steps_per_epoch": 2}
    source = build_source(Recipe(name="r", dataset="tinyshakespeare", data_args=arguments))
    assert [len(inputs) for inputs, _ in source.eval_batches("test", 3)] == [3, 2]
    own = build_source(Recipe(name="r", dataset="text", data_args=arguments, data_path=str(tmp_path / "own.txt")))
    assert own.model_args["vocab_size"] == source.model_args["vocab_size"] + 1
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff")
    for path, words in [("image.png", "is not UTF-8 text"), (".", "holds no input.txt"), ("none.txt", "no dataset")]:
        with pytest.raises(EspalierError, match=words):
            build_source(Recipe(name="r", dataset="text", data_path=str(tmp_path / path)))
    with pytest.raises(EspalierError, match="length 200 is too long for a text of 1000 characters"):
        TextSource(TEXT, 200)
    with pytest.raises(EspalierError, match="length 8 is too long for a text of 0 characters"):
        TextSource("", 8)
