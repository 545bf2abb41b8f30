"""The loggers that a run's rows go to as well: TensorBoard, CSV or Weights & Biases, in Fabric's interface."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from espalier.errors import EspalierError, require, told
from espalier.recipes.base import Recipe
from espalier.train.run import START

LOGS = "logs"
"""Subfolder of a run folder for the files of a logger."""
_LIBRARIES = {"tensorboard": ("tensorboard",), "wandb": ("wandb", "lightning.pytorch.loggers")}


def check_logger(recipe: Recipe) -> None:
    """Import what the recipe's logger needs.

    Raises:
        MissingExtraError: a library is not installed.
    """
    for library in _LIBRARIES.get(recipe.logger, ()):
        require(library, "loggers")


class RowLogger:
    """Sends every row of a run to the recipe's logger, one call a row.

    Local files (CSV, TensorBoard) are written anew from ``rows`` when a run goes on, so that they hold every row once.
    Weights & Biases goes on with the run that it has.

    Args:
        recipe: ``logger`` names the kind.
        out: the run folder.
        rows: the rows that the run has so far.

    Raises:
        EspalierError: Weights & Biases refuses the run (not logged in, no connection).
    """

    def __init__(self, recipe: Recipe, out: Path, rows: Iterable[Mapping[str, Any]]) -> None:
        self._kind = recipe.logger
        folder = out / LOGS
        if self._kind == "wandb":
            # The time of the first weights tells this run from another one that had the same folder.
            name = f"{out.resolve()}\0{(out / START).stat().st_mtime_ns}"
            self._logger: Any = require("lightning.pytorch.loggers", "loggers").WandbLogger(
                name=f"{out.parent.name}/{out.name}",
                save_dir=folder,
                project=os.environ.get("WANDB_PROJECT", "espalier"),
                id=hashlib.sha256(name.encode()).hexdigest()[:16],
                resume="allow",
            )
            folder.mkdir(exist_ok=True)
            return
        loggers = require("lightning_fabric.loggers", "train")
        shutil.rmtree(folder / self._kind, ignore_errors=True)
        if self._kind == "csv":
            self._logger = loggers.CSVLogger(folder, self._kind, version="", flush_logs_every_n_steps=1)
        else:
            self._logger = loggers.TensorBoardLogger(folder, self._kind, version="")
        for row in rows:
            self.log(row)

    def log(self, row: Mapping[str, Any]) -> None:
        """Send one row; what is missing or no number is left out."""
        numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
        try:
            self._logger.log_metrics(numbers, step=row["step"])
        except OSError:
            raise
        except Exception as error:  # wandb raises kinds of its own
            raise EspalierError(f"logger {self._kind!r}: {told(error)}") from error

    def close(self) -> None:
        """Write what is still held back, and end the run at Weights & Biases."""
        self._logger.finalize("success")
        if self._kind == "wandb":
            self._logger.experiment.finish()
