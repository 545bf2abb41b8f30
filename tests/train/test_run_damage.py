"""Every file of a run folder damaged in every way: repaired, or refused by name in one line; never a wrong number."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from standins import BlobSource, recipe

from espalier import data
from espalier.data.images import ImageSource
from espalier.data.labelled import ImageData, LabelledImages
from espalier.data.text import TextSource
from espalier.errors import EspalierError
from espalier.train import RunInterrupted, load_run, train
from espalier.train.manifest import damaged, file_digest, write_manifest

pytestmark = pytest.mark.usefixtures("stand_ins")

CHANGES: dict[str, Any] = {"ema_decay": 0.9, "epochs": 3, "label_smoothing": 0.1}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    for place in range(len(content) // 2, min(len(content), len(content) // 2 + 64)):
        content[place] ^= 0x10
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "replaced": lambda path: path.write_bytes(b'{"loss": 0.1, "score": 1.0, "files": {}, "notes": {}}\n'),
    "gone": lambda path: path.unlink(),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a device": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
}


def outcome(path: Path) -> dict[str, Any]:
    run = load_run(path)
    timed = ("seconds", "step_seconds")
    assert run.result is not None
    return {
        "rows": [{key: value for key, value in row.items() if key not in timed} for row in run.rows],
        "result": {key: value for key, value in run.result.items() if key not in timed},
        "weights": {name: tensor.tolist() for name, tensor in run.model().state_dict().items()},
    }


def attempt(path: Path) -> tuple[dict[str, Any] | None, str | None]:
    """Train in a folder and read everything that is in it: what came out, or the one line that refuses it."""
    try:
        found = outcome(train(recipe(**CHANGES), path).path)
        load_run(path).model("start")
    except EspalierError as error:
        return None, str(error)
    return found, None


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run, and one that was stopped in its last epoch with two checkpoints in its folder."""
    train(recipe(**CHANGES), tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(data, "build_source", lambda _: BlobSource(signal_at=(2, 3, signal.SIGTERM)))
        with pytest.raises(RunInterrupted):
            train(recipe(**CHANGES), tmp_path / "cut")
    assert (tmp_path / "cut/checkpoint.old").is_dir()
    return tmp_path


def files_of(path: Path) -> list[str]:
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_damage_of_a_finished_run_gives_a_wrong_number(runs: Path, damage: str) -> None:
    expected = outcome(runs / "whole")
    refused = 0
    for name in files_of(runs / "whole"):
        shutil.copytree(runs / "whole", runs / "copy")
        DAMAGES[damage](runs / "copy" / name)
        found, refusal = attempt(runs / "copy")
        assert found in (None, expected)
        if refusal is not None:
            assert "\n" not in refusal
            known = (name, f"{runs / 'copy'} has no manifest.json", "is not a run folder")
            assert any(words in refusal for words in known), refusal
            refused += 1
        shutil.rmtree(runs / "copy")
    # A result that is gone is trained again; nothing else can be repaired.
    assert refused == len(files_of(runs / "whole")) - (damage == "gone")


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_damage_of_a_stopped_run_gives_a_wrong_number(
    runs: Path, damage: str, recwarn: pytest.WarningsRecorder
) -> None:
    expected = outcome(runs / "whole")
    repaired = []
    for name in files_of(runs / "cut"):
        shutil.copytree(runs / "cut", runs / "copy")
        DAMAGES[damage](runs / "copy" / name)
        recwarn.clear()
        found, refusal = attempt(runs / "copy")
        assert found in (None, expected)
        if found is not None:
            repaired.append(name)
        elif refusal is not None:
            assert "\n" not in refusal
            named = (name, f"{runs / 'copy'} has no manifest.json", "is not a run folder")
            assert any(words in refusal for words in named), refusal
        if name.startswith("checkpoint/"):
            (warning,) = recwarn
            assert "goes on from the checkpoint before it, at step 10" in str(warning.message)
        shutil.rmtree(runs / "copy")
    checkpoints = [name for name in files_of(runs / "cut") if name.startswith("checkpoint")]
    assert len(checkpoints) == 6
    # Rows come from the checkpoint; what is no file is not replaced by one.
    assert set(repaired) == {*checkpoints, *(["metrics.jsonl"] if damage not in ("a pipe", "a device") else [])}


@pytest.mark.parametrize("name", ["environment.json", "model.json", "start.safetensors"])
def test_damage_of_what_is_written_once_is_found_before_the_first_step(runs: Path, name: str) -> None:
    flip(runs / "cut" / name)
    before = {file: (runs / "cut" / file).read_bytes() for file in files_of(runs / "cut")}
    with pytest.raises(EspalierError, match=f"{name} is damaged: restore it from a copy"):
        train(recipe(**CHANGES), runs / "cut")
    assert {file: (runs / "cut" / file).read_bytes() for file in files_of(runs / "cut")} == before


def test_two_damaged_checkpoints_are_refused(runs: Path) -> None:
    for name in ("checkpoint", "checkpoint.old"):
        flip(runs / "cut" / name / "state.json")
    with pytest.raises(
        EspalierError, match=r"checkpoint/state.json .*checkpoint.old/state.json .*delete both"
    ) as caught:
        train(recipe(**CHANGES), runs / "cut")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["checkpoint", "checkpoint.old", "checkpoint.partial"])
@pytest.mark.parametrize("kind", ["file", "link to a folder", "link to nothing"])
def test_what_stands_where_a_checkpoint_belongs_is_replaced(
    runs: Path, name: str, kind: str, recwarn: pytest.WarningsRecorder
) -> None:
    place = runs / "cut" / name
    shutil.rmtree(place, ignore_errors=True)
    (runs / "elsewhere").mkdir()
    (runs / "elsewhere/kept.txt").write_text("somebody's")
    if kind == "file":
        place.write_text("no folder")
    else:
        place.symlink_to(runs / ("elsewhere" if kind == "link to a folder" else "nowhere"))
    train(recipe(**CHANGES), runs / "cut")
    assert outcome(runs / "cut") == outcome(runs / "whole")
    assert not list((runs / "cut").glob("checkpoint*"))
    assert (runs / "elsewhere/kept.txt").exists()
    assert len(recwarn) == (name == "checkpoint" and kind != "link to nothing")


@settings(max_examples=30)
@given(places=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 7)), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_any_flipped_bit_of_any_file_is_found(
    tmp_path_factory: pytest.TempPathFactory, places: list[tuple[float, int]], seed: int
) -> None:
    folder = tmp_path_factory.mktemp("flips")
    for number in range(3):
        (folder / f"{number}.bin").write_bytes(os.urandom(10 + seed))
    write_manifest(folder, {path.name: [file_digest(path)] for path in folder.glob("*.bin")}, {"data": "x"})
    name = ("0.bin", "1.bin", "2.bin", "manifest.json")[seed % 4]
    content = bytearray((folder / name).read_bytes())
    before = bytes(content)
    for place, bit in places:
        content[min(int(place * len(content)), len(content) - 1)] ^= 1 << bit
    (folder / name).write_bytes(content)
    try:
        found = damaged(folder)
    except EspalierError as error:
        found = str(error)
    # Two flips of one bit undo each other; of the manifest, blanks may change.
    if content == before:
        assert found is None
    elif found is None:
        assert name == "manifest.json"
        assert json.loads(content) == json.loads(before)
    else:
        assert name in found


# Hostile checkpoints: their digests are right, because whoever made them wrote those, too.


def reseal(folder: Path) -> None:
    names = [path.name for path in folder.iterdir() if path.name != "manifest.json"]
    write_manifest(folder, {name: [file_digest(folder / name)] for name in names})


def hostile_shape(folder: Path) -> None:
    (shard,) = folder.glob("*.safetensors")
    tensors = load_file(shard)
    save_file({**tensors, "model/stem.weight": torch.zeros(3, 3)}, shard)


def hostile_name(folder: Path) -> None:
    (shard,) = folder.glob("*.safetensors")
    tensors = load_file(shard)
    save_file({**tensors, "model/../../stem": torch.zeros(3, 3)}, shard)


def hostile_header(folder: Path) -> None:
    (shard,) = folder.glob("*.safetensors")
    shard.write_bytes((2**62).to_bytes(8, "little") + shard.read_bytes()[8:])


def hostile_offsets(folder: Path) -> None:
    (shard,) = folder.glob("*.safetensors")
    header = json.dumps({"model/stem.weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    shard.write_bytes(len(header).to_bytes(8, "little") + header)


def hostile_pickle(folder: Path) -> None:
    (shard,) = folder.glob("*.safetensors")
    torch.save({"model/stem.weight": torch.zeros(1)}, shard)


def hostile_json(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "state.json").write_text(text)


def hostile_counters(**values: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        state = json.loads((folder / "state.json").read_text())
        state["counters"].update(values)
        (folder / "state.json").write_text(json.dumps(state))

    return change


HOSTILE = {
    "shape": hostile_shape,
    "name": hostile_name,
    "header": hostile_header,
    "offsets": hostile_offsets,
    "pickle": hostile_pickle,
    "list": hostile_json("[]"),
    "deep": hostile_json("[" * 10**5),
    "no counters": hostile_json('{"optimizer": {}, "averages": true, "counters": {}}'),
    "unknown parameter": hostile_json('{"optimizer": {"nobody": ["step"]}, "averages": true}'),
    "text for a step": hostile_counters(step="many"),
    "a step beyond the epoch": hostile_counters(step=10**9),
    "a negative epoch": hostile_counters(epoch=-3),
    "half a step": hostile_counters(step=12.5),
    "NaN": hostile_counters(loss_sum=float("nan")),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_checkpoint_is_refused_in_one_line(runs: Path, kind: str) -> None:
    HOSTILE[kind](runs / "cut/checkpoint")
    reseal(runs / "cut/checkpoint")
    with pytest.raises(EspalierError, match="is not one of this run") as caught:
        train(recipe(**CHANGES), runs / "cut")
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_finite_end_the_run(runs: Path) -> None:
    (shard,) = (runs / "cut/checkpoint").glob("*.safetensors")
    tensors = load_file(shard)
    tensors["model/depthwise.weight"][0] = float("nan")
    save_file(tensors, shard)
    reseal(runs / "cut/checkpoint")
    run = train(recipe(**CHANGES), runs / "cut")
    assert run.result is not None
    assert run.result["score"] is None
    assert run.result["diverged_at"].startswith("step 15: 'weight' of layer 'depthwise'")


# Data that changed between stop and resume.


def images(count: int = 12, names: tuple[str, ...] = ("cat", "dog"), shift: int = 0) -> ImageSource:
    pixels = torch.arange(count * 27).remainder(256).to(torch.uint8).view(count, 3, 3, 3) + shift
    split = LabelledImages(pixels, torch.arange(count) % len(names))
    return ImageSource(ImageData(split, split, names))


def test_digests_tell_data_apart() -> None:
    one = images()
    assert one.digest == images().digest
    others = [images(11), images(names=("cat", "cow")), images(names=("dog", "cat")), images(shift=1)]
    texts = [TextSource("hello world " * 20, 4), TextSource("hello w0rld " * 20, 4), TextSource("hello world " * 21, 4)]
    assert len({source.digest for source in [one, *others, *texts]}) == 8


@pytest.mark.parametrize("finished", [False, True])
def test_changed_data_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: bool) -> None:
    source = BlobSource(signal_at=None if finished else (1, 1, signal.SIGTERM))
    source.digest = "as it was"  # type: ignore[attr-defined]
    monkeypatch.setattr(data, "build_source", lambda _: source)
    try:
        train(recipe(epochs=2), tmp_path / "run")
    except RunInterrupted:
        assert not finished
    source.signal_at, source.digest = None, "changed"  # type: ignore[attr-defined]
    with pytest.raises(EspalierError, match=r"the data of .*run have changed since it was started"):
        load_run(tmp_path / "run").source() if finished else train(recipe(epochs=2), tmp_path / "run")
    source.digest = "as it was"  # type: ignore[attr-defined]
    assert train(recipe(epochs=2), tmp_path / "run").source() is source


def test_a_reader_beside_a_training_run_sees_no_damage(tmp_path: Path) -> None:
    """Whoever looks between two changes of a run finds whole rows: the manifest knows each before it is there."""
    from espalier.train.run import write_rows

    run = train(recipe(epochs=1), tmp_path / "run").path
    (run / "result.json").unlink()
    rows: list[dict[str, Any]] = []
    write_rows(run, rows)
    for step in range(5):
        rows.append({"epoch": step, "step": step, "seconds": 0.0})
        write_rows(run, rows, keep=len(rows) - 1)
        assert load_run(run).rows == rows
    content = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(content[: content.rindex(b"{")])  # the manifest is ahead of the file
    assert load_run(run).rows == rows[:-1]
    (run / "metrics.jsonl").write_bytes(content[:-3])  # a kill within the last line
    assert load_run(run).rows == rows[:-1]
