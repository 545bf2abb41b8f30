"""Streamed and mapped images: the batches of a source in memory, for any number of workers, from any position."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from espalier.data import ImageSource, Source, StreamSource, build_source, decoded, stream
from espalier.data.encoded import EncodedImages
from espalier.errors import EspalierError
from espalier.recipes import get_recipe
from espalier.recipes.base import Recipe
from espalier.train import train

COUNT = 30
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def write_jpeg(number: int, quality: int = 90) -> bytes:
    """Return a JPEG of noise whose sides depend on ``number``."""
    pixels = np.random.default_rng(number).integers(0, 256, (9 + number % 4, 8 + number % 5, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", quality=quality)
    return content.getvalue()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of three classes with a training and a validation set."""
    root = tmp_path_factory.mktemp("images")
    for number in range(COUNT + 10):
        split = "train" if number < COUNT else "val"
        file = root / split / f"class{number % 3}" / f"{number:03d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(write_jpeg(number))
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("ESPALIER_CACHE", str(place))
    monkeypatch.setattr(stream, "_CHUNK", 3)
    return place


def source_of(path: Path, storage: str, workers: int | None = None, **changes: Any) -> Any:
    reads = {} if workers is None else {"workers": workers}
    fields = {"dataset": "folder", "data_path": str(path), "data_args": {"size": 6, "storage": storage, **reads}}
    return build_source(replace(Recipe(name="test"), **{**fields, **changes}))


def same_batches(one: Source, other: Source, batch_size: int = 7) -> None:
    assert one.steps_per_epoch(batch_size) == other.steps_per_epoch(batch_size) == COUNT // batch_size
    for epoch in range(2):
        for step in range(one.steps_per_epoch(batch_size)):
            for mine, theirs in zip(
                one.train_batch(4, epoch, step, batch_size), other.train_batch(4, epoch, step, batch_size), strict=True
            ):
                torch.testing.assert_close(mine, theirs)
    for mine, theirs in zip(one.eval_batches("test", 4), other.eval_batches("test", 4), strict=True):
        torch.testing.assert_close(mine, theirs)


AUGMENTED = {"crop_padding": 2, "flip": True, "erasing": 0.5, "mixup": 0.5, "cutmix": 0.5}


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize(("storage", "more"), [("stream", {}), ("mapped", {"crop_scale": (0.3, 1.0)})])
def test_batches_are_those_of_a_source_in_memory(
    images: Path, storage: str, more: dict[str, Any], workers: int
) -> None:
    there = source_of(images, storage, workers, **AUGMENTED, **more)
    held = source_of(images, "memory", **AUGMENTED, **more)
    assert isinstance(there, StreamSource)
    assert isinstance(held, ImageSource)
    assert there.model_args == held.model_args == {"num_classes": 3, "in_chans": 3, "img_size": 6}
    same_batches(there, held)
    for limit in (None, 1, 7):
        for mine, theirs in zip(there.images("test", limit), held.images("test", limit), strict=True):
            torch.testing.assert_close(mine, theirs)


def test_crops_do_not_depend_on_workers_or_on_what_was_asked_before(images: Path) -> None:
    fields = {"crop_scale": (0.08, 1.0), **AUGMENTED}
    same_batches(source_of(images, "stream", 0, **fields), source_of(images, "stream", 2, **fields))
    source = source_of(images, "stream", 1, **fields)
    asked = [(0, 1, 2, 5), (0, 1, 3, 5), (1, 1, 3, 5), (0, 0, 5, 5), (0, 1, 0, 5), (0, 1, 2, 5)]
    for position in asked:
        torch.testing.assert_close(
            source.train_batch(*position), source_of(images, "stream", 0, **fields).train_batch(*position)
        )
    first, later = (source.train_batch(0, epoch, 0, COUNT)[0] for epoch in (0, 1))
    assert not torch.equal(first.sum((1, 2, 3)).sort().values, later.sum((1, 2, 3)).sort().values), "crops are new"


def opened_files(source: StreamSource, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    opened = EncodedImages.open

    def note(self: EncodedImages, index: int) -> Any:
        seen.append(self.place(index))
        return opened(self, index)

    monkeypatch.setattr(EncodedImages, "open", note)
    return seen


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(epoch=st.integers(0, 3), batch_size=st.integers(1, COUNT), data=st.data())
def test_a_resumed_run_reads_the_steps_that_are_left_and_no_other(
    images: Path, epoch: int, batch_size: int, data: st.DataObject
) -> None:
    steps = COUNT // batch_size
    step = data.draw(st.integers(0, steps - 1))
    with pytest.MonkeyPatch.context() as patch:
        whole, resumed = source_of(images, "stream", 0), source_of(images, "stream", 0)
        seen = opened_files(whole, patch)
        unbroken = [whole.train_batch(1, epoch, at, batch_size)[0] for at in range(steps)]
        before, seen[:] = list(seen), []
        rest = [resumed.train_batch(1, epoch, at, batch_size)[0] for at in range(step, steps)]
        assert seen == before[step * batch_size :]
        assert len(set(before)) == steps * batch_size, "no image twice in an epoch"
    torch.testing.assert_close(torch.cat(rest), torch.cat(unbroken[step:]))


@pytest.mark.parametrize("workers", [0, 2])
def test_shares_of_processes_make_the_whole_batch(images: Path, workers: int) -> None:
    whole = source_of(images, "stream", 0, normalize="none")
    shares = [source_of(images, "stream", workers, normalize="none").share(rank, 3) for rank in range(3)]
    for step in range(3):
        pixels, labels = whole.train_batch(0, 0, step, 8)
        for rank, share in enumerate(shares):
            mine, mine_labels = share.train_batch(0, 0, step, 8)
            torch.testing.assert_close(mine, pixels[rank::3])
            assert mine_labels.tolist() == labels[rank::3].tolist()
    # Ten images in batches of three: the last batch has one for the first process and none for the others.
    counts = [[len(images) for images, _ in share.eval_batches("test", 3)] for share in shares]
    assert counts == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0]]


def write_shard(path: Path, samples: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in samples.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def samples_of(numbers: range) -> dict[str, bytes]:
    samples = {}
    for number in numbers:
        stem = f"some/{'long' * 40 if number % 7 == 0 else 'short'}/{number:03d}"
        samples[f"{stem}.jpg"] = write_jpeg(number)
        samples[f"{stem}.json"] = b"{}"
        samples[f"{stem}.cls"] = str(number % 3).encode()
    return samples


@pytest.mark.parametrize(
    "names",
    [("train/0.tar", "train/1.tar", "val/0.tar"), ("set-train-0.tar", "set-train-1.tar", "set-validation-0.tar")],
)
@pytest.mark.parametrize("storage", ["stream", "mapped", "memory"])
def test_shards_hold_what_folders_hold(images: Path, tmp_path: Path, names: tuple[str, ...], storage: str) -> None:
    for name, numbers in zip(names, (range(14), range(14, COUNT), range(COUNT, COUNT + 10)), strict=True):
        write_shard(tmp_path / name, samples_of(numbers))
    shards = source_of(tmp_path, storage, dataset="shards", normalize="none")
    assert shards.class_names == ("0", "1", "2")
    folder = source_of(images, "stream", 0, normalize="none")

    def by_label(batch: tuple[torch.Tensor, torch.Tensor]) -> list[tuple[int, float]]:
        return sorted((int(label), round(image.double().sum().item(), 3)) for image, label in zip(*batch, strict=True))

    assert by_label(shards.train_batch(0, 0, 0, COUNT)) == by_label(folder.train_batch(0, 0, 0, COUNT))
    (mine,), (theirs,) = (list(source.eval_batches("test", 10)) for source in (shards, folder))
    assert by_label(mine) == by_label(theirs)


def test_shards_without_names_of_splits_are_split_by_class(tmp_path: Path) -> None:
    write_shard(tmp_path / "constrained.tar", samples_of(range(30)))
    source = source_of(tmp_path, "stream", 0, dataset="shards", data_args={"size": 6, "test_share": 0.2})
    labels = torch.cat([labels for _, labels in source.eval_batches("test", 4)])
    assert labels.bincount().tolist() == [2, 2, 2]
    assert source.steps_per_epoch(1) == 24


@pytest.mark.parametrize(
    ("shards", "words"),
    [
        ({}, "holds no .tar file"),
        ({"train/0.tar": {"a.jpg": b"", "a.cls": b"0"}}, "all are train shards"),
        (
            {"train/0.tar": {"a.jpg": b"", "a.cls": b"0"}, "0.tar": {"a.jpg": b"", "a.cls": b"0"}},
            "0.tar is of no split",
        ),
        ({"0.tar": {"a.jpg": b""}}, "sample a has no class"),
        ({"0.tar": {"a.cls": b"1"}}, "sample a has no image"),
        ({"0.tar": {"a.jpg": b"", "a.png": b"", "a.cls": b"1"}}, "two images of the name"),
        ({"0.tar": {"a.jpg": b"", "a.cls": b"-1"}}, "'-1'"),
        ({"0.tar": {"a.jpg": b"", "a.cls": b"cat"}}, "'cat'"),
        ({"0.tar": {"a.jpg": b"", "a.cls": b"9" * 19}}, "write the number of a class"),
        ({"0.tar": {"a.txt": b"x"}}, "holds no image"),
        ({"train/0.tar": {"a.jpg": b"", "a.cls": b"0"}, "val/0.tar": {"a.jpg": b"", "a.cls": b"4"}}, "class '4'"),
        (
            {
                "train/0.tar": {"a.jpg": b"", "a.cls": b"0", "b.jpg": b"", "b.cls": b"2"},
                "val/0.tar": {"a.jpg": b"", "a.cls": b"1"},
            },
            "class '1' has test images and no training images",
        ),
    ],
)
def test_doubtful_shards_are_refused_in_one_line(
    tmp_path: Path, shards: dict[str, dict[str, bytes]], words: str
) -> None:
    for name, samples in shards.items():
        write_shard(tmp_path / name, samples)
    with pytest.raises(EspalierError) as caught:
        source_of(tmp_path, "stream", dataset="shards")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_shard_is_refused_or_read_without_what_was_hit(tmp_path_factory: Any, data: st.DataObject) -> None:
    place = tmp_path_factory.mktemp("damaged") / "0.tar"
    write_shard(place, samples_of(range(6)))
    content = bytearray(place.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=20)):
            content[at] ^= 1 << data.draw(st.integers(0, 7))
    place.write_bytes(content)
    message = refusal(
        lambda: source_of(
            place, "stream", 0, dataset="shards", normalize="none", data_args={"size": 6, "test_share": 0.4}
        ).train_batch(0, 0, 0, 1)
    )
    assert message is None or str(place) in message or "test_share" in message


def refusal(call: Callable[[], object]) -> str | None:
    """Return the one line that ``call`` is refused with, None if it is not."""
    try:
        call()
    except EspalierError as error:
        message = str(error)
    else:
        return None
    assert "\n" not in message
    return message


def children() -> list[int]:
    found = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [int(pid) for pid in found if "resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_text()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc: run on Linux")
def test_a_killed_worker_is_one_line_and_no_worker_outlives_its_source(images: Path) -> None:
    before = set(children())
    source = source_of(images, "stream", 2, normalize="none")
    source.train_batch(0, 0, 0, 4)
    workers = set(children()) - before
    assert len(workers) == 2
    for name in ("TERM", "USR1", "INT"):  # from a third process, as Slurm's
        subprocess.run(["kill", f"-{name}", *map(str, workers)], check=True)
    source.train_batch(0, 0, 1, 4)
    assert set(children()) - before == workers, "signals to the group leave the workers at work"
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    reads = [partial(source.train_batch, 0, 0, step, 4) for step in range(2, 7)]
    message = next(filter(None, map(refusal, reads)), None)
    reads.clear()
    assert re.search("was killed.*--data-args.workers", message or "")
    source.train_batch(0, 0, 2, 4)
    assert len(set(children()) - before) == 2
    del source
    assert set(children()) == before


@pytest.mark.parametrize("end", ["", "; sys.exit(3)", "; raise KeyboardInterrupt"])
def test_a_process_ends_while_its_workers_are_ahead(images: Path, end: str) -> None:
    program = (
        "import sys; from dataclasses import replace; from espalier.data import build_source; "
        "from espalier.recipes.base import Recipe; source = build_source(Recipe(name='test', dataset='folder', "
        f"data_path={str(images)!r}, normalize='none', data_args={{'size': 6, 'storage': 'stream', 'workers': 2}})); "
        f"source.train_batch(0, 0, 0, 4){end}"
    )
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, timeout=200, check=False)
    assert run.returncode == {"": 0, "; sys.exit(3)": 3}.get(end, -signal.SIGINT)


def test_a_bad_image_is_named_when_it_is_met(images: Path, tmp_path: Path) -> None:
    for file in images.rglob("*.jpg"):
        copy = tmp_path / file.relative_to(images)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    bad = [tmp_path / "train" / "class1" / "001.jpg", tmp_path / "train" / "class2" / "002.jpg"]
    for file in bad:
        file.write_bytes(file.read_bytes()[:100])
    for workers in (0, 2):
        source = source_of(tmp_path, "stream", workers, normalize="none")
        with pytest.raises(EspalierError, match=r"cannot decode .*class. ?/?.*jpg") as caught:
            source.train_batch(0, 0, 0, COUNT)
        assert "\n" not in str(caught.value)
    with pytest.raises(EspalierError, match=r"2 of 30 images") as caught:
        source_of(tmp_path, "mapped")
    assert all(str(file) in str(caught.value) for file in bad)


def test_too_little_room_is_said_before_anything_is_read(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EncodedImages, "open", lambda self, index: pytest.fail("an image was read"))
    monkeypatch.setattr(decoded, "free_memory", lambda: 1000.0)
    with pytest.raises(EspalierError, match=r"0\.0 GB.*--data-args\.storage mapped"):
        source_of(images, "memory")
    monkeypatch.setattr(decoded.shutil, "disk_usage", lambda folder: SimpleNamespace(free=9))
    with pytest.raises(EspalierError, match=r"ESPALIER_CACHE.*--data-args\.storage stream"):
        source_of(images, "mapped")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"storage": "cloud"}, "unknown storage 'cloud'"),
        ({"storage": 3}, "unknown storage '3'"),
        ({"workers": -1}, "workers is -1"),
        ({"workers": "two"}, "workers is 'two'"),
        ({"size": 0}, "size is 0"),
        ({"test_share": 1}, "test_share is 1"),
        ({"train_limit": 31}, "lower it"),
    ],
)
def test_wrong_arguments_are_named(images: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(EspalierError, match=words):
        source_of(images, "stream", data_args={"storage": "stream", **change})


def test_colours_are_measured_once(images: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = source_of(images, "stream", 0).normalizer
    seen = opened_files(source_of(images, "stream", 0), monkeypatch)
    again = source_of(images, "stream", 0).normalizer
    assert not seen
    for file in cache.glob("values-*.json"):
        file.write_text("[1")
    mended = source_of(images, "stream", 0).normalizer
    assert len(seen) == COUNT
    pixels = torch.rand(2, 3, 6, 6)
    torch.testing.assert_close(first(pixels), again(pixels))
    torch.testing.assert_close(first(pixels), mended(pixels))


def test_dropout_draws_the_same_whatever_is_read(images: Path) -> None:
    def draw(workers: int) -> torch.Tensor:
        source = source_of(images, "stream", workers, crop_scale=(0.5, 1.0))
        torch.manual_seed(0)
        source.train_batch(0, 0, 0, 8)
        return torch.rand(4)

    torch.testing.assert_close(draw(0), draw(2))


def test_the_imagenet_recipe_trains_on_a_folder(images: Path, tmp_path: Path) -> None:
    shape = {"dim": 8, "depth": 1, "kernel_size": 3, "patch_size": 7}
    small = {"model": "convmixer", "model_args": shape, "epochs": 2, "batch_size": 8, "precision": "32", "threads": 1}
    rows = []
    for workers in (0, 2):
        reads = {"size": 14, "storage": "stream", "workers": workers}
        recipe = replace(get_recipe("convmixer_imagenet"), data_path=str(images), data_args=reads, **small)
        run = train(recipe, tmp_path / f"with-{workers}", progress=False)
        assert run.result is not None
        assert run.result["steps"] == 6
        rows.append([{name: row[name] for name in ("train_loss", "test/loss")} for row in run.rows])
    assert rows[0] == [pytest.approx(row) for row in rows[1]]
