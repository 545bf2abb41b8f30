"""What processes share: every streamed image once an epoch, one structure, and what audit and doctor say of shards."""

from __future__ import annotations

import json
import math
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from streamed import EPOCHS, STEPS, TRAIN, write_images
from test_distributed import assert_same_run, launch

from espalier.train import load_run

# The images of a step as (process, numbers), by (epoch, step).
Given = dict[tuple[int, int], list[list[int]]]


def given(folder: Path, name: str, world: int) -> Given:
    """Return what every process of a run was given; a step that one of them was given twice fails."""
    found: Given = {}
    for rank in range(world):
        lines = [json.loads(line) for line in (folder / f"{name}.{rank}.jsonl").read_text().splitlines()]
        places = [(epoch, step) for epoch, step, _ in lines]
        assert len(set(places)) == len(places), f"{name}, rank {rank}: a step was read twice"
        for epoch, step, numbers in lines:
            found.setdefault((epoch, step), []).append(numbers)
    return found


@pytest.mark.slow
def test_processes_read_every_streamed_image_once_an_epoch(tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    groups = """
        1:ddp stream0:whole stream2-cut:stop=1.1 --
        2:ddp stream0-2:whole stream3-2:whole stream1-cut:stop=1.2 stream2-cut:stop=2.3 --
        2:fsdp2 stream1-cut:end --
        1:ddp stream2-cut:end
    """
    launch(tmp_path, *groups.split())
    alone = given(tmp_path, "stream0", 1)
    orders = []
    for epoch in range(EPOCHS):
        order = [number for step in range(STEPS) for number in alone[epoch, step][0]]
        assert sorted(order) == list(range(TRAIN))
        orders.append(order)
    assert orders[0] != orders[1]
    for name in ("stream0-2", "stream3-2", "stream1-cut"):
        shares = given(tmp_path, name, 2)
        assert shares.keys() == alone.keys()
        for place, (mine, yours) in shares.items():
            assert len(mine) == len(yours)
            assert sorted(mine + yours) == sorted(alone[place][0]), f"{name} at {place}"
        assert shares == given(tmp_path, "stream0-2", 2), "neither workers nor a stop change anything"
        assert_same_run(load_run(tmp_path / name), load_run(tmp_path / "stream0"))
    # Stopped in mid-epoch, gone on by other numbers of processes: no step read twice, none left out.
    moved = given(tmp_path, "stream2-cut", 2)
    assert {place: sorted(chain(*numbers)) for place, numbers in moved.items()} == {
        place: sorted(numbers) for place, (numbers,) in alone.items()
    }
    assert_same_run(load_run(tmp_path / "stream2-cut"), load_run(tmp_path / "stream0"))


def looks(folder: Path, name: str, rank: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.{rank}.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_shards_in_training_are_structured_audited_and_examined_as_a_whole_model(tmp_path: Path) -> None:
    groups = """
        1:ddp observed:whole --
        2:fsdp2 observed-2:whole observed-4:stop=1.3 --
        4:fsdp2 observed-4:end
    """
    launch(tmp_path, *groups.split())
    whole = load_run(tmp_path / "observed")
    alone = looks(tmp_path, "observed", 0)
    assert len(alone) == whole.recipe.epochs
    assert {row["status"] for row in alone[0]["rows"]} == {"present"}
    for name, world in (("observed-2", 2), ("observed-4", 4)):
        # Every rank drew another structure: what trains is what rank 0 drew.
        assert (tmp_path / name / "start.safetensors").read_bytes() == (
            tmp_path / "observed/start.safetensors"
        ).read_bytes()
        assert_same_run(load_run(tmp_path / name), whole)
        ranks = [looks(tmp_path, name, rank) for rank in range(world)]
        for there in ranks:
            last = there[-1]
            assert len(last["shards"]) > 10, "nothing is sharded: nothing is tested"
            assert last["shards"] == last["left"]
            assert_same_look(last, alone[-1])
    for one, other in zip(*(looks(tmp_path, "observed-2", rank) for rank in range(2)), strict=True):
        assert one == other
    for mine, theirs in zip(looks(tmp_path, "observed-2", 1), alone, strict=True):
        assert_same_look(mine, theirs)


def assert_same_look(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert mine["findings"] == theirs["findings"]
    for left, right in zip(mine["rows"], theirs["rows"], strict=True):
        assert {k: v for k, v in left.items() if k != "measured"} == {k: v for k, v in right.items() if k != "measured"}
        assert left["measured"].keys() == right["measured"].keys()
        for key, value in right["measured"].items():
            assert left["measured"][key] == pytest.approx(value, rel=1e-3, abs=1e-4, nan_ok=True), key
            assert math.isfinite(value) or value != value
