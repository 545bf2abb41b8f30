"""Run by test_distributed, alone or under a launcher: ``FOLDER STRATEGY [RUN:WHAT …]``, WHAT is whole, stop=E.S or end.

``stop=E.S`` trains until rank 0 alone gets SIGTERM at step S of epoch E; ``end`` goes on to the last epoch.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import standins
import torch

from espalier import data, models
from espalier.train import RunInterrupted, train

RECIPES = {
    # Batch norm over micro-batches, averaged weights, clipped gradients, a test set that 4 processes share unevenly.
    "images": standins.recipe(
        eps=1e-3, clip_norm=0.5, accumulate=2, ema_decay=0.9, model_args={"dropout": 0.0}, eval_batch_size=4
    ),
    # The ranks' shares of a token batch hold different numbers of targets; two modules share a weight.
    "tokens": standins.recipe(eps=1e-3, dataset="echo", model="tied"),
    "blocks": standins.recipe(eps=1e-3, model="blocks", precision="bf16"),
}


def main(folder: Path, strategy: str, *runs: str) -> None:
    models.build_model = standins.build_model
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    for run in runs:
        name, _, what = run.partition(":")
        kind = name.partition("-")[0]

        def build_source(recipe: object, kind: str = kind, what: str = what) -> object:
            source = standins.build_source(RECIPES[kind])
            if what.startswith("stop=") and rank == 0:
                epoch, step = map(int, what.removeprefix("stop=").split("."))
                source.signal_at = (epoch, step, signal.SIGTERM)
            return source

        data.build_source = build_source
        stopped = None
        try:
            train(RECIPES[kind], folder / name, strategy=strategy)
        except RunInterrupted as interruption:
            stopped = interruption.status
        assert stopped == (75 if what.startswith("stop=") else None)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # left to the interpreter's end, its threads may abort the process


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
