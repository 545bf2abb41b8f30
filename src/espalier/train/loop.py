"""The one training loop: every run, every arm of a study, on CPU, GPU or several of them."""

from __future__ import annotations

import errno
import logging
import math
import os
import statistics
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from espalier.data.source import Source
from espalier.errors import EspalierError, require
from espalier.files import load_weights, write_json, write_tensors
from espalier.randomness import derive_generator
from espalier.recipes.base import Recipe
from espalier.recipes.validation import resolve_recipe
from espalier.train.build import build_optimizer, build_run_model, build_run_source, freeze_, resolved_model_args
from espalier.train.checkpoint import (
    Counters,
    drop_checkpoint,
    load_checkpoint,
    save_checkpoint,
    settle,
)
from espalier.train.ema import AveragedWeights
from espalier.train.evaluate import evaluate
from espalier.train.loggers import RowLogger, check_logger
from espalier.train.losses import Loss, build_loss, target_count
from espalier.train.progress import Advance, StepClock, progress_bar
from espalier.train.run import (
    FINAL,
    RESULT,
    START,
    Run,
    RunInterrupted,
    append_row,
    check_folder,
    create_folder,
    cut_rows,
    finite,
    load_run,
)
from espalier.train.schedule import learning_rate

# Steps between looks at the loss: a look makes the host wait for the device.
_STEPS_PER_LOOK = 50


@dataclass
class _Session:
    """The live objects of a run."""

    recipe: Recipe
    out: Path
    fabric: Any
    source: Source
    model: nn.Module
    """The bare model: what is saved."""
    module: nn.Module
    """The model as the loop calls it: compiled, in its precision, perhaps distributed."""
    optimizer: torch.optim.Optimizer
    stepper: Any
    """The optimiser as the loop calls it."""
    averages: AveragedWeights | None
    loss: Loss
    counters: Counters
    logger: RowLogger | None
    """On the first process."""
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.steps_per_epoch = self.source.steps_per_epoch(self.recipe.batch_size)
        self.clock = StepClock(self.fabric.device)
        # Float64 holds a sum of float32 losses exactly enough that a resumed run reports the same mean to the bit.
        wide = torch.float32 if self.fabric.device.type == "mps" else torch.float64
        self.loss_sum = torch.tensor(self.counters.loss_sum, dtype=wide, device=self.fabric.device)


def train(
    recipe: Recipe, out: Path | str, *, resume: Literal["auto", "never"] = "auto", progress: bool | None = None
) -> Run:
    """Train as ``recipe`` says, into the run folder ``out``, and return the finished run.

    A run that is already finished is returned as it is; an unfinished one goes on from its last checkpoint to the
    same numbers as one that was never stopped. A loss that stops being finite ends the run: its result says
    ``"diverged": true`` and its score is None. Under torchrun the same call trains on all processes; each takes its
    share of every batch.

    Args:
        recipe: the run.
        out: its folder; made when missing.
        resume: ``"never"`` refuses an unfinished run instead of going on with it.
        progress: show a progress bar; None shows it where standard error is a terminal.

    Raises:
        EspalierError: bad recipe, a folder of another recipe, a full disk, a damaged checkpoint.
        RunInterrupted: stopped from the keyboard; calling again goes on.
    """
    recipe, out = resolve_recipe(recipe), Path(out)
    if check_folder(out, recipe, resume) == "finished":
        drop_checkpoint(out)  # what a kill just after the result may have left
        return load_run(out)
    with _own_threads(recipe.threads), _one_line_errors(out):
        fabric = _make_fabric(recipe)
        with torch.random.fork_rng(devices=[fabric.device] if fabric.device.type == "cuda" else []):
            _fit(_open(recipe, out, fabric), progress)
        fabric.barrier()
    return load_run(out)


def _make_fabric(recipe: Recipe) -> Any:
    fabric_class = require("lightning_fabric", "train").Fabric
    precision = {"32": "32-true", "bf16": "bf16-mixed"}[recipe.precision]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        local, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
        fabric = fabric_class(devices=local, num_nodes=world // local, strategy="ddp", precision=precision)
        fabric.launch()
        return fabric
    # A trial is one process; the plain environment keeps Fabric from taking a Slurm job's shape for its own.
    alone = require("lightning_fabric.plugins.environments", "train").LightningEnvironment()
    with _quiet(logging.getLogger("lightning_fabric")):
        return fabric_class(devices=1, precision=precision, plugins=[alone])


def _open(recipe: Recipe, out: Path, fabric: Any) -> _Session:
    check_logger(recipe)
    loss = build_loss(recipe)
    source = build_run_source(recipe)
    model, report = build_run_model(recipe, source)
    freeze_(model, recipe)
    fabric.barrier()
    if fabric.is_global_zero:
        if not (out / START).exists():
            create_folder(out, recipe, source, model, resolved_model_args(recipe, source), report)
        settle(out)
    fabric.barrier()
    load_weights(model, out / START)
    model.to(fabric.device)
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = build_optimizer(model, recipe)
    module, stepper = fabric.setup(torch.compile(model) if recipe.compile else model, optimizer)
    averages = AveragedWeights(model, recipe.ema_decay) if recipe.ema_decay else None
    found = load_checkpoint(out, model, optimizer)
    counters, averaged = found or (Counters(), None)
    if averages is not None and averaged is not None:
        averages.load_state_dict(averaged, counters.step)
    if fabric.is_global_zero:
        cut_rows(out, counters.rows)
    fabric.barrier()
    source = source.to(fabric.device)
    rows = load_run(out).rows
    logger = RowLogger(recipe, out, out / START, rows) if fabric.is_global_zero else None
    return _Session(
        recipe, out, fabric, source, model, module, optimizer, stepper, averages, loss, counters, logger, rows
    )


def _fit(s: _Session, show: bool | None) -> None:
    recipe, counters = s.recipe, s.counters
    show = show if s.fabric.is_global_zero else False
    with progress_bar(recipe.name, recipe.epochs * s.steps_per_epoch, counters.step, show) as advance:
        if not counters.rows:
            _add_row(s, advance)
        while counters.epoch < recipe.epochs:
            healthy = _train_epoch(s, advance)
            counters.epoch += 1
            last = counters.epoch == recipe.epochs
            if last or not healthy or counters.epoch % recipe.eval_every == 0:
                healthy = _add_row(s, advance) and healthy
            if not healthy:
                return _finish(s, diverged=True)
            if last or counters.epoch % recipe.checkpoint_every == 0:
                _save(s)
    return _finish(s, diverged=False)


def _train_epoch(s: _Session, advance: Advance) -> bool:
    """Train for one epoch and return whether the losses stayed finite."""
    recipe, counters = s.recipe, s.counters
    # Layers that draw (dropout) read the global stream, which is this run's own here: see fork_rng in train.
    torch.manual_seed(derive_generator(recipe.seed, "layers", counters.epoch, s.fabric.global_rank).initial_seed())
    s.module.train()
    s.clock.mark()
    for step in range(s.steps_per_epoch):
        inputs, targets = s.source.train_batch(recipe.seed, counters.epoch, step, recipe.batch_size)
        rate = learning_rate(recipe, counters.step, s.steps_per_epoch)
        for group in s.optimizer.param_groups:
            group["lr"] = rate
        s.loss_sum += _step(s, inputs, targets)
        counters.step += 1
        counters.loss_steps += 1
        s.clock.mark()
        advance(1, "")
        if counters.step % _STEPS_PER_LOOK == 0 and not math.isfinite(s.loss_sum.item()):
            break
    counters.seconds += s.clock.stop()
    return math.isfinite(_mean_over_ranks(s, s.loss_sum))


def _step(s: _Session, inputs: Tensor, targets: Tensor) -> Tensor:
    """Take one optimiser step on a whole batch, in micro-batches, and return its mean loss."""
    recipe, rank, world = s.recipe, s.fabric.global_rank, s.fabric.world_size
    # The whole batch's count, so that parts with few targets weigh little; DDP averages where we mean a sum.
    scale = world / target_count(targets)
    if recipe.channels_last and inputs.dim() == 4:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    inputs_parts = inputs[rank::world].chunk(recipe.accumulate)
    targets_parts = targets[rank::world].chunk(recipe.accumulate)
    total = torch.zeros((), device=s.fabric.device)
    for index, (part, wanted) in enumerate(zip(inputs_parts, targets_parts, strict=True)):
        with _sync_only_last(s, index == len(inputs_parts) - 1):
            loss = s.loss(s.module(part), wanted) * scale
            s.fabric.backward(loss)
        total += loss.detach()
    if recipe.clip_norm:
        s.fabric.clip_gradients(s.module, s.stepper, max_norm=recipe.clip_norm, error_if_nonfinite=False)
    s.stepper.step()
    s.optimizer.zero_grad(set_to_none=True)
    if s.averages is not None:
        s.averages.update()
    return total


def _sync_only_last(s: _Session, last: bool) -> AbstractContextManager[Any]:
    if last or s.fabric.world_size == 1:
        return nullcontext()
    context: AbstractContextManager[Any] = s.fabric.no_backward_sync(s.module)
    return context


def _add_row(s: _Session, advance: Advance) -> bool:
    """Evaluate, write a row, and return whether its losses are finite."""
    recipe, counters, fabric = s.recipe, s.counters, s.fabric
    with s.averages.applied() if s.averages is not None else nullcontext():
        scores = evaluate(
            s.module,
            s.source,
            build_loss(recipe, smoothing=False),
            recipe.eval_batch_size,
            rank=fabric.global_rank,
            world=fabric.world_size,
            reduce=lambda sums: fabric.all_reduce(sums, reduce_op="sum"),
        )
    train_loss = _mean_over_ranks(s, s.loss_sum) / counters.loss_steps if counters.loss_steps else None
    row = {
        "epoch": counters.epoch,
        "step": counters.step,
        "lr": learning_rate(recipe, max(0, counters.step - 1), s.steps_per_epoch),
        "train_loss": train_loss,
        "seconds": counters.seconds,
        "step_seconds": s.clock.median(),
        **scores,
    }
    counters.rows, counters.loss_steps = counters.rows + 1, 0
    s.loss_sum.zero_()
    s.rows.append(finite(row))
    if fabric.is_global_zero:
        append_row(s.out, row)
    if s.logger is not None:
        s.logger.log(s.rows[-1])
    split = s.source.eval_splits[0]
    advance(0, f"{split} accuracy {scores[f'{split}/accuracy']:.4f}")
    return math.isfinite(scores[f"{split}/loss"]) and (train_loss is None or math.isfinite(train_loss))


def _mean_over_ranks(s: _Session, value: Tensor) -> float:
    return float(s.fabric.all_reduce(value.clone(), reduce_op="mean"))


def _save(s: _Session) -> None:
    s.counters.loss_sum = _mean_over_ranks(s, s.loss_sum)
    if s.fabric.is_global_zero:
        averages = None if s.averages is None else s.averages.state_dict()
        save_checkpoint(s.out, s.model, s.optimizer, averages, s.counters)
    s.fabric.barrier()


def _finish(s: _Session, *, diverged: bool) -> None:
    """Write the final weights (none if the run diverged) and, last of all, the result."""
    if not s.fabric.is_global_zero:
        return
    split, last = s.source.eval_splits[0], s.rows[-1]
    if not diverged:
        with s.averages.applied() if s.averages is not None else nullcontext():
            write_tensors(s.out / FINAL, s.model.state_dict())
    times = [row["step_seconds"] for row in s.rows if row["step_seconds"] is not None]
    result = {
        "score": None if diverged else last[f"{split}/accuracy"],
        "metric": f"{split}/accuracy",
        "loss": None if diverged else last[f"{split}/loss"],
        "epochs": s.counters.epoch,
        "steps": s.counters.step,
        "seconds": s.counters.seconds,
        "step_seconds": statistics.median(times) if times else None,
        "diverged": diverged,
    }
    if s.logger is not None:
        s.logger.close()
    write_json(s.out / RESULT, result)
    drop_checkpoint(s.out)


@contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _own_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _one_line_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except RunInterrupted:
        raise
    except KeyboardInterrupt:
        raise RunInterrupted(
            f"interrupted: run the same command again and the run in {out} goes on from its last checkpoint"
        ) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"the disk is full ({out}): free some space and run the same command again to go on"
            raise EspalierError(message) from error
        if isinstance(error, PermissionError | NotADirectoryError | FileExistsError):
            raise EspalierError(f"{error.strerror}: {error.filename}: choose another folder for the run") from error
        raise
