"""Stand-ins for training that worker processes can import (the tests put this folder on PYTHONPATH)."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch

from espalier.errors import EspalierError
from espalier.recipes import Recipe
from fabricated_runs import fabricate_usual


def note(recipe: Recipe, path: Path) -> None:
    """Leave a line saying which process ran what, with how many threads."""
    line = f"{os.getpid()} {recipe.init} {recipe.lr:g} {recipe.seed} {torch.get_num_threads()}\n"
    with (Path(os.environ["ESPALIER_TEST_LOG"])).open("a") as file:
        file.write(line)


def quick(recipe: Recipe, path: Path) -> None:
    note(recipe, path)
    time.sleep(0.3)
    fabricate_usual(recipe, path)


def fail_on_seed_one(recipe: Recipe, path: Path) -> None:
    note(recipe, path)
    if recipe.seed == 1:
        raise EspalierError("batch_size 9 is too large") if recipe.init == "default" else RuntimeError("two\nlines")
    fabricate_usual(recipe, path)


def die_on_seed_one(recipe: Recipe, path: Path) -> None:
    note(recipe, path)
    if recipe.seed == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    fabricate_usual(recipe, path)


def slow(recipe: Recipe, path: Path) -> None:
    note(recipe, path)
    time.sleep(60)
