"""What a run is done under: its own threads, the lock on its folder, and errors that are one line."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from espalier.errors import EspalierError
from espalier.files import locked
from espalier.memory import is_exhausted
from espalier.recipes.base import Recipe
from espalier.train.checkpoint import has_checkpoint
from espalier.train.parallel import first_of_any
from espalier.train.requests import Requests, RunInterrupted


@contextmanager
def held(out: Path, fabric: Any) -> Iterator[None]:
    """Keep other runs out of the folder for the length of a ``with`` block.

    Raises:
        EspalierError: another run is in it; all processes are told.
    """
    with ExitStack() as stack:
        refusal = None
        if fabric.is_global_zero:
            # A run that is refused leaves no empty folders behind.
            for parent in [each for each in out.parents if not each.exists()][::-1]:
                stack.callback(_remove_if_empty, parent)
            out.parent.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(locked(out))
            except EspalierError as error:
                refusal = str(error)
        if (refusal := first_of_any(refusal)) is not None:
            raise EspalierError(refusal)
        yield


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


@contextmanager
def own_threads(threads: int) -> Iterator[None]:
    """Use this many CPU threads (0: as many as now) for the length of a ``with`` block."""
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def one_line_errors(recipe: Recipe, out: Path, requests: Requests) -> Iterator[None]:
    """Turn what a machine can do to a run into one line that says how to go on.

    Raises:
        EspalierError: a full disk, a folder that cannot be written, too little memory.
        RunInterrupted: Ctrl-C or a signal before the steps.
    """
    try:
        yield
    except RunInterrupted:
        raise
    except KeyboardInterrupt:
        message = f"run the same command again and the run in {out} goes on from its last checkpoint"
        if not has_checkpoint(out):  # data may take minutes to be read
            message = f"the run in {out} has no checkpoint yet; run the same command again to start it"
        if requests.signal is None:  # raised by somebody else's handler
            raise RunInterrupted(f"interrupted: {message}") from None
        raise requests.interruption(message) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            message = f"the disk is full ({out}): free some space and run the same command again to go on"
            raise EspalierError(message) from error
        raise EspalierError(f"{error.strerror}: {error.filename or out}: choose another folder for the run") from error
    except (MemoryError, RuntimeError) as error:
        if not is_exhausted(error):
            raise
        raise EspalierError(_out_of_memory(recipe, out)) from error


def _out_of_memory(recipe: Recipe, out: Path) -> str:
    size, parts = recipe.batch_size, recipe.accumulate
    more = next((n for n in range(2 * parts, size + 1) if size % n == 0), None)
    said = f"out of memory with batch_size {size} in {parts} part{'s' if parts > 1 else ''}"
    if more is None:
        return f"{said}: one example at a time is too much: choose a smaller model"
    return (
        f"{said}: try --accumulate {more} (parts of {size // more}, the same batch) and, if it is the evaluation, "
        f"--eval-batch-size {max(1, recipe.eval_batch_size // 2)}, in another folder than {out}"
    )
