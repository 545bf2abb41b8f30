"""Run by test_resume in a process of its own: trains in forked children that are killed with SIGKILL and resumed."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import standins

from espalier import data, models
from espalier.errors import require
from espalier.train import train

models.build_model = standins.build_model

RECIPES: dict[str, dict[str, Any]] = {
    # Rows and checkpoints fall on different epochs, so the running loss must be carried over as well.
    "images": {"ema_decay": 0.9, "accumulate": 2, "clip_norm": 1.0, "eval_every": 3, "label_smoothing": 0.1},
    "tokens": {"dataset": "echo", "model": "tied", "checkpoint_every": 2, "optimizer": "adam"},
    "matrices": {"dataset": "echo", "model": "tied", "optimizer": "muon"},
    "last": {"optimizer": "nadam", "channels_last": True, "precision": "bf16", "schedule": "piecewise"},
}


def in_child(work: Callable[[], None]) -> int:
    """Run ``work`` in a forked child and return the signal that ended it, 0 if none did."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status)
    assert os.WEXITSTATUS(status) == 0
    return 0


def run(kind: str, out: Path, kill_at: tuple[int, int] | None = None, kill_write: int | None = None) -> None:
    def build_source(recipe: Any) -> Any:
        source = standins.build_source(recipe)
        if kill_at is not None:
            train_batch = source.train_batch

            def deadly(seed: int, epoch: int, step: int, batch_size: int) -> Any:
                if (epoch, step) == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return train_batch(seed, epoch, step, batch_size)

            source.train_batch = deadly
        return source

    data.build_source = build_source
    if kill_write is not None:
        die_at_write(kill_write)
    train(standins.recipe(**RECIPES[kind]), out)


def die_at_write(count: int) -> None:
    """Kill this process at its ``count``-th change of a folder; a file that is being written is left half written."""
    done = 0

    def guarded(function: Callable[..., Any], half: bool) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            done += 1
            if done == count:
                if half:
                    function(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    os.replace, os.rename = guarded(os.replace, False), guarded(os.rename, False)  # type: ignore[assignment]
    shutil.rmtree = guarded(shutil.rmtree, False)  # type: ignore[assignment]
    Path.mkdir = guarded(Path.mkdir, False)  # type: ignore[method-assign]
    Path.write_bytes = guarded(Path.write_bytes, True)  # type: ignore[method-assign]


def outcome(out: Path) -> dict[str, Any]:
    """Return everything of a run that must not depend on a kill: weights to the bit, rows and result but for times."""
    timed = {"seconds", "step_seconds"}
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((out / "result.json").read_text())
    return {
        "start": (out / "start.safetensors").read_bytes().hex(),
        "final": (out / "final.safetensors").read_bytes().hex(),
        "rows": [{key: value for key, value in row.items() if key not in timed} for row in rows],
        "result": {key: value for key, value in result.items() if key not in timed},
        "files": sorted(str(path.relative_to(out)) for path in out.rglob("*")),
        "beside": sorted(path.name for path in out.parent.iterdir() if path.name.startswith(".")),
    }


def mid_epoch(kind: str, folder: Path, epoch: int, step: int) -> None:
    assert in_child(lambda: run(kind, folder / "whole")) == 0
    assert in_child(lambda: run(kind, folder / "cut", kill_at=(epoch, step))) == signal.SIGKILL
    assert (folder / "cut/checkpoint/state.json").exists(), "killed before the first checkpoint: nothing is tested"
    assert not (folder / "cut/result.json").exists()
    assert in_child(lambda: run(kind, folder / "cut")) == 0
    assert outcome(folder / "cut") == outcome(folder / "whole")


def every_write(kind: str, folder: Path) -> None:
    assert in_child(lambda: run(kind, folder / "whole")) == 0
    expected = outcome(folder / "whole")

    def survives(count: int) -> bool:
        out = folder / f"cut{count}"
        if in_child(lambda: run(kind, out, kill_write=count)) == 0:
            return False
        assert in_child(lambda: run(kind, out)) == 0
        found = outcome(out)
        wrong = [key for key in expected if found[key] != expected[key]]
        assert not wrong, f"killed at write {count}: {wrong} differ"
        return True

    print("writes", next(count for count in itertools.count(1) if not survives(count)) - 1)


if __name__ == "__main__":
    require("lightning_fabric", "train")  # once, before the forks
    what, folder = sys.argv[1], Path(sys.argv[2])
    if what == "mid_epoch":
        for kind, epoch, step in (("images", 2, 3), ("tokens", 3, 1), ("last", 1, 4)):
            mid_epoch(kind, folder / kind, epoch, step)
    else:
        every_write("tokens", folder)
