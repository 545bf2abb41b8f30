"""Run by test_distributed, under a launcher or by itself.

``FOLDER STRATEGY RUN:WHAT …`` is one process of those that a launcher started, or alone. ``FOLDER N:STRATEGY RUN:WHAT …
-- N:STRATEGY …`` starts groups of N processes one after the other, by forks, so that torch is imported once. WHAT is
``whole``, ``stop=E.S`` (rank 0 alone gets SIGTERM at step S of epoch E), ``end`` (go on to the last epoch) or
``refused``. Runs are
called after their kind: one of ``RECIPES``, ``observed``, or ``streamN``, whose N workers read ``FOLDER/images``.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import observed
import standins
import streamed

from espalier import data, models
from espalier.cli.main import leave_process_group
from espalier.errors import EspalierError, require
from espalier.recipes import Recipe
from espalier.train import RunInterrupted, train

RECIPES = {
    # Batch norm over micro-batches, averaged weights, clipped gradients, a test set that 4 processes share unevenly.
    "images": standins.recipe(
        eps=1e-3, clip_norm=0.5, accumulate=2, ema_decay=0.9, model_args={"dropout": 0.0}, eval_batch_size=4
    ),
    # The same with a last batch of 3: of two micro-batches of 2 and of 1, most processes of four get nothing.
    "ragged": standins.recipe(eps=1e-3, accumulate=2, model_args={"dropout": 0.0}),
    # The ranks' shares of a token batch hold different numbers of targets; two modules share a weight.
    "tokens": standins.recipe(eps=1e-3, dataset="echo", model="tied"),
    "blocks": standins.recipe(eps=1e-3, model="blocks", precision="bf16"),
    # Parameters of one number, of which all but one process hold nothing.
    "orthogonal": standins.recipe(eps=1e-3, model="orthogonal", ema_decay=0.9),
    "idle": standins.recipe(eps=1e-3, model="idle"),
    "matrices": standins.recipe(eps=1e-3, model="blocks", optimizer="muon"),
}


def one_process(folder: Path, strategy: str, *runs: str) -> None:
    models.build_model = standins.build_model
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    for run in runs:
        name, _, what = run.partition(":")
        kind = name.partition("-")[0]
        if kind == "observed":
            recipe = observed.recipe()
            observed.look_after_checkpoints(rank)
        elif kind.startswith("stream"):
            recipe = streamed.recipe(folder / "images", int(kind.removeprefix("stream")))
        else:
            recipe = RECIPES[kind]

        def build_source(recipe: Recipe, name: str = name, what: str = what, kind: str = kind) -> object:
            source: Any = (
                streamed.NotingSource(recipe, folder / f"{name}.{rank}.jsonl")
                if recipe.dataset == "folder"
                else standins.build_source(recipe)
            )
            if kind == "ragged":
                source.last = 3
            if what.startswith("stop=") and rank == 0:
                epoch, step = map(int, what.removeprefix("stop=").split("."))
                source.signal_at = (epoch, step, signal.SIGTERM)
            return source

        data.build_source = build_source
        stopped = None
        try:
            train(recipe, folder / name, strategy=strategy)
        except RunInterrupted as interruption:
            stopped = interruption.status
        except EspalierError as error:
            assert what == "refused"
            print(error)
        assert stopped == (75 if what.startswith("stop=") else None)
    leave_process_group()


def group(processes: int, folder: Path, strategy: str, *runs: str) -> None:
    """Fork the processes of a group with the environment that torchrun gives, and wait for them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            if processes > 1:
                sizes = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "RANK": rank, "LOCAL_RANK": rank}
                os.environ.update({name: str(value) for name, value in sizes.items()})
                os.environ |= {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "forks"}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            try:
                one_process(folder, strategy, *runs)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    failed = False
    for _ in children:
        _, status = os.wait()
        if status and not failed:
            failed = True
            for child in children:  # the others would wait for the one that failed
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
    assert not failed, (processes, strategy, runs)


if __name__ == "__main__":
    folder, first, *rest = sys.argv[1:]
    if ":" not in first:
        one_process(Path(folder), first, *rest)
    else:
        require("lightning_fabric", "train")  # once, before the forks
        for words in " ".join([first, *rest]).split(" -- "):
            how, *runs = words.split()
            group(int(how.partition(":")[0]), Path(folder), how.partition(":")[2], *runs)
