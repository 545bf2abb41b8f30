"""The one training loop: every run, every arm of a study, on CPU, GPU or several of them."""

from __future__ import annotations

import math
import statistics
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from espalier.errors import EspalierError
from espalier.files import load_weights, named, write_tensors
from espalier.randomness import derive_generator, generators_kept, seed_globally
from espalier.recipes.base import Recipe
from espalier.recipes.validation import resolve_recipe
from espalier.train.build import build_optimizer, build_run_model, build_run_source
from espalier.train.checkpoint import clear_finished, drop_checkpoint, load_checkpoint, save_checkpoint
from espalier.train.ema import AveragedWeights
from espalier.train.evaluate import evaluate
from espalier.train.loggers import RowLogger, check_logger
from espalier.train.losses import build_loss, target_count
from espalier.train.nonfinite import find_nonfinite
from espalier.train.parallel import (
    Strategy,
    first_of_any,
    full_state,
    gather_objects,
    make_fabric,
    synchronise_batch_norms,
)
from espalier.train.progress import Advance, progress_bar
from espalier.train.requests import NOTHING, STOP, Requests
from espalier.train.run import (
    FINAL,
    RECIPE,
    START,
    Run,
    check_data,
    check_folder,
    create_folder,
    finite,
    lasting_files,
    load_run,
    refuse_damage,
    write_recipe,
    write_result,
    write_rows,
)
from espalier.train.schedule import learning_rate
from espalier.train.session import Session
from espalier.train.surroundings import held, one_line_errors, own_threads

# Steps between looks at the loss on a GPU: a look makes the host wait for the device.
_STEPS_PER_LOOK = 50


class _StopEvaluation(Exception):
    """A signal came during an evaluation, which may take longer than a scheduler waits."""


def train(
    recipe: Recipe,
    out: Path | str,
    *,
    resume: Literal["auto", "never"] = "auto",
    progress: bool | None = None,
    strategy: Strategy = "ddp",
    checkpoint_every_minutes: float | None = None,
) -> Run:
    """Train as ``recipe`` says, into the run folder ``out``, and return the finished run.

    A run that is already finished is returned as it is; an unfinished one goes on from its last checkpoint to the
    same numbers as one that was never stopped. A loss or weights that stop being finite end the run: its result says
    ``"diverged": true`` and where, its score is None, and its last checkpoint stays. Under torchrun or srun the same
    call trains on all processes; each takes its share of every batch. Ctrl-C, SIGTERM and SIGUSR1 write a checkpoint
    after the present step, or the present batch of an evaluation.

    Args:
        recipe: the run.
        out: its folder; made when missing.
        resume: ``"never"`` refuses an unfinished run instead of going on with it.
        progress: show a progress bar; None shows it where standard error is a terminal.
        strategy: how several processes hold the model: whole each (``"ddp"``) or in shards (``"fsdp2"``). A run may go
            on under another strategy and on another number of processes.
        checkpoint_every_minutes: write a checkpoint when this long has passed since the last, too.

    Raises:
        EspalierError: bad recipe, a folder of another recipe or in use, changed data, damaged files, a full disk, too
            little memory.
        RunInterrupted: stopped by Ctrl-C or a signal; calling again goes on.
    """
    recipe, out = resolve_recipe(recipe), named(Path(out))
    if checkpoint_every_minutes is not None and not checkpoint_every_minutes > 0:
        raise EspalierError(f"checkpoint_every_minutes {checkpoint_every_minutes} must be positive")
    if check_folder(out, recipe, resume) == "finished":
        run = load_run(out)
        if not (run.result or {}).get("diverged"):
            clear_finished(out)
        return run
    requests = Requests(checkpoint_every_minutes)
    with own_threads(recipe.threads), one_line_errors(recipe, out, requests), requests:
        fabric = make_fabric(recipe, strategy)
        devices = [fabric.device] if fabric.device.type == "cuda" else []
        with held(out, fabric), generators_kept(devices):
            # Whoever held the folder until now may have finished the run.
            if check_folder(out, recipe, resume) != "finished":
                _fit(_open(recipe, out, fabric, strategy, requests), progress)
            fabric.barrier()
    return load_run(out)


def _open(recipe: Recipe, out: Path, fabric: Any, strategy: Strategy, requests: Requests) -> Session:
    check_logger(recipe)
    loss = build_loss(recipe)
    source = build_run_source(recipe)
    model, report = build_run_model(recipe, source)
    fabric.barrier()
    if fabric.is_global_zero and not (out / RECIPE).exists():
        create_folder(out, recipe, source, model, report)
    fabric.barrier()
    refuse_damage(out, {START, *lasting_files(out)})  # not after days of training, when the run is read back
    check_data(out, source)
    load_weights(model, out / START)
    if recipe.channels_last and strategy != "fsdp2":  # FSDP2 shards the first axis of contiguous parameters
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = synchronise_batch_norms(model, fabric)
    module = fabric.setup_module(torch.compile(model) if recipe.compile else model)
    optimizer = build_optimizer(model, recipe)
    stepper = fabric.setup_optimizers(optimizer)
    averages = AveragedWeights(model, recipe.ema_decay)
    steps = source.steps_per_epoch(recipe.batch_size)
    counters, rows = load_checkpoint(out, model, optimizer, averages.tensors, steps)
    averages.updates = counters.step
    if fabric.is_global_zero:
        write_recipe(out, recipe)
        write_rows(out, rows)
    fabric.barrier()
    source = source.to(fabric.device)
    logger = RowLogger(recipe, out, rows) if recipe.logger and fabric.is_global_zero else None
    return Session(
        recipe, out, fabric, source, model, module, optimizer, stepper, averages, loss, counters, requests, logger,
        rows,
    )  # fmt: skip


def _fit(s: Session, show: bool | None) -> None:
    recipe, counters = s.recipe, s.counters
    show = show if s.fabric.is_global_zero else False
    total = recipe.epochs * s.steps_per_epoch
    with s.requests.noted(), progress_bar(recipe.name, total, counters.step, show) as advance:
        healthy = True
        if not s.rows:
            _add_row(s, advance)
        while healthy and counters.epoch < recipe.epochs:
            healthy = _train_epoch(s, advance)
            counters.epoch += 1
            last = counters.epoch == recipe.epochs
            if last or not healthy or counters.epoch % recipe.eval_every == 0:
                healthy = _add_row(s, advance) and healthy
            if healthy and (last or counters.epoch % recipe.checkpoint_every == 0):
                _save(s)
        _finish(s, diverged=not healthy)
    if s.requests.signal is not None:
        raise s.requests.interruption(f"the run in {s.out} is finished")


def _train_epoch(s: Session, advance: Advance) -> bool:
    """Train to the end of the epoch and return whether the losses stayed finite."""
    recipe, counters = s.recipe, s.counters
    every = 1 if s.fabric.device.type == "cpu" else _STEPS_PER_LOOK
    s.module.train()
    s.clock.mark()
    for step in range(counters.step - counters.epoch * s.steps_per_epoch, s.steps_per_epoch):
        inputs, targets = _batch(s, counters.epoch, step)
        rate = learning_rate(recipe, counters.step, s.steps_per_epoch)
        for group in s.optimizer.param_groups:
            group["lr"] = rate
        _seed(s, "layers", counters.epoch, step, s.fabric.global_rank)
        s.loss_sum += _step(s, inputs, targets)
        counters.step += 1
        counters.loss_steps += 1
        s.clock.mark()
        advance(1, "")
        if counters.step % every == 0 and not math.isfinite(s.loss_sum.item()):
            break
        if not _obey(s):
            break
    counters.seconds += s.clock.stop()
    return _healthy(s)


def _seed(s: Session, *keys: int | str) -> None:
    """Start the global generators anew, so that a run may be resumed at any step: layers (dropout) and code of the
    user's own draw from them, and here they are this run's own (``generators_kept`` in ``train``)."""
    seed_globally(derive_generator(s.recipe.seed, *keys))


def _batch(s: Session, epoch: int, step: int) -> tuple[Tensor, Tensor]:
    """Return the batch of a step, the same on all processes."""
    _seed(s, "batch", epoch, step)
    return s.source.train_batch(s.recipe.seed, epoch, step, s.recipe.batch_size)


def _healthy(s: Session) -> bool:
    """Return whether the losses since the last row and the weights are finite."""
    return math.isfinite(s.loss_sum.item()) and s.spoilt() is None


def _obey(s: Session) -> bool:
    """Save if it is time to, save and stop if a signal asks for it: all processes after the same step.

    Returns:
        False where the run has diverged: there is nothing to save any more.
    """
    request = s.agreed_request()
    if request == NOTHING:
        return True
    s.counters.seconds += s.clock.stop()
    saved = _save(s)
    s.clock.mark()
    if request == STOP and saved:
        raise s.stopped()
    return saved


def _step(s: Session, inputs: Tensor, targets: Tensor) -> Tensor:
    """Take one optimiser step on a whole batch, in micro-batches, and return its mean loss over all processes."""
    recipe, world = s.recipe, s.fabric.world_size
    # The whole batch's count, so that parts with few targets weigh little; DDP averages where we mean a sum.
    shares = world if s.mine == slice(None) else 1
    scale = world / (shares * torch.as_tensor(target_count(targets)).clamp_min(1))
    if recipe.channels_last and inputs.dim() == 4:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    # The whole batch is cut before it is shared: layers that look at all processes' examples meet equally often.
    inputs_parts, targets_parts = inputs.chunk(recipe.accumulate), targets.chunk(recipe.accumulate)
    total = torch.zeros((), device=s.fabric.device)
    for index, (part, wanted) in enumerate(zip(inputs_parts, targets_parts, strict=True), start=1):
        with nullcontext() if index == len(inputs_parts) else s.fabric.no_backward_sync(s.module):
            loss = s.loss(s.module(part[s.mine]), wanted[s.mine]) * scale
            s.fabric.backward(loss)
        total += loss.detach()
    if world > 1 and s.counters.step == s.resumed_at:
        _refuse_unused(s)
    total = s.fabric.all_reduce(total, reduce_op="mean")
    s.guard.note(total)
    if recipe.clip_norm:
        s.fabric.clip_gradients(s.module, s.stepper, max_norm=recipe.clip_norm, error_if_nonfinite=False)
    s.stepper.step()
    s.optimizer.zero_grad(set_to_none=True)
    s.averages.update()
    return total


def _refuse_unused(s: Session) -> None:
    """Refuse a trained parameter without a gradient, of which DDP would tell a page at the next step."""
    unused = (name for name, p in s.model.named_parameters() if p.requires_grad and p.grad is None)
    name = first_of_any(
        next((name for name in unused if not hasattr(s.model.get_parameter(name), "full_tensor")), None)
    )
    if name is not None:
        raise EspalierError(
            f"model {s.recipe.model}: parameter {name!r} takes no part in its output, and copies of a model on several "
            "processes need a gradient of all: call requires_grad_(False) on it, or choose strategy 'fsdp2'"
        )


def _add_row(s: Session, advance: Advance) -> bool:
    """Evaluate, write a row (without scores that mean nothing), and return whether losses and weights are finite."""
    recipe, counters, fabric = s.recipe, s.counters, s.fabric

    def stop_if_asked() -> None:
        # What is no longer finite is not worth a checkpoint: the run ends by itself.
        if s.agreed_request() == STOP and _healthy(s):
            raise _StopEvaluation

    try:
        with s.averages.applied():
            scores = evaluate(
                s.module, s.source, build_loss(recipe, smoothing=False), recipe.eval_batch_size, mine=s.mine,
                reduce=lambda sums: fabric.all_reduce(sums, reduce_op="sum"), after_batch=stop_if_asked,
                before_batch=lambda split, index: _seed(s, "evaluation", split, index),
            )  # fmt: skip
    except _StopEvaluation:
        # The row is still to come: the resumed run begins at the end of this epoch, with the evaluation.
        counters.epoch = max(0, counters.epoch - 1)
        _save(s)
        raise s.stopped() from None
    train_loss = s.loss_sum.item() / counters.loss_steps if counters.loss_steps else None
    losses = [scores[f"{split}/loss"] for split in s.source.eval_splits]
    sound = s.spoilt() is None and math.isfinite(losses[0]) and not any(map(math.isnan, losses))
    if not sound:
        scores = dict.fromkeys(scores, math.nan)
    row = {
        "epoch": counters.epoch,
        "step": counters.step,
        "lr": learning_rate(recipe, max(0, counters.step - 1), s.steps_per_epoch),
        "train_loss": train_loss,
        "seconds": counters.seconds,
        "step_seconds": s.clock.median(),
        **scores,
    }
    counters.loss_steps = 0
    s.loss_sum.zero_()
    s.rows.append(finite(row))
    if fabric.is_global_zero:
        write_rows(s.out, s.rows, keep=len(s.rows) - 1)
    if s.logger is not None:
        s.logger.log(s.rows[-1])
    split = s.source.eval_splits[0]
    advance(0, f"{split} accuracy {scores[f'{split}/accuracy']:.4f}")
    return sound and (train_loss is None or math.isfinite(train_loss))


def _save(s: Session) -> bool:
    """Write a checkpoint, unless loss or weights are no longer finite: the last good one is worth more."""
    if not _healthy(s):
        return False
    s.counters.loss_sum = s.loss_sum.item()
    save_checkpoint(s.out, s.model, s.optimizer, s.averages.tensors, s.counters, s.rows)
    s.requests.saved()
    s.request = torch.zeros_like(s.request)
    return True


def _finish(s: Session, *, diverged: bool) -> None:
    """Write the final weights (none if the run diverged) and, last of all, the result."""
    result: dict[str, Any] = {"diverged": diverged}
    if diverged:
        result["diverged_at"] = _locate(s)
    else:
        with s.averages.applied():
            state = full_state(s.model)
            if s.fabric.is_global_zero:
                write_tensors(s.out / FINAL, state)
    if not s.fabric.is_global_zero:
        return
    split, last = s.source.eval_splits[0], s.rows[-1]
    times = [row["step_seconds"] for row in s.rows if row["step_seconds"] is not None]
    result |= {
        "score": None if diverged else last[f"{split}/accuracy"],
        "metric": f"{split}/accuracy",
        "loss": None if diverged else last[f"{split}/loss"],
        "epochs": s.counters.epoch,
        "steps": s.counters.step,
        "seconds": s.counters.seconds,
        "step_seconds": statistics.median(times) if times else None,
    }
    if s.logger is not None:
        s.logger.close()
    write_result(s.out, result)
    if not diverged:
        drop_checkpoint(s.out)


def _locate(s: Session) -> str:
    """Say at which step the loss was not finite and which tensor was the first; all processes look at their shares."""
    recipe, healthy = s.recipe, s.guard.healthy_steps()
    s.model.train(healthy is not None)
    if healthy is None:
        place, parts = "the evaluation", 1
        batches = s.source.eval_batches(s.source.eval_splits[0], recipe.eval_batch_size)
    else:
        place, parts = f"step {s.resumed_at + healthy + 1}", recipe.accumulate
        epoch, index = divmod(s.resumed_at + healthy, s.steps_per_epoch)
        batches = iter([_batch(s, epoch, index)])
        _seed(s, "layers", epoch, index, s.fabric.global_rank)
    for inputs, _ in batches:
        for part in inputs.chunk(parts):
            share = part[s.mine]
            with s.fabric.autocast():
                found = find_nonfinite(s.model, share if len(share) else inputs.new_zeros(1, *inputs.shape[1:]))
            first = min((each for each in gather_objects(found) if each is not None), default=None)
            if first is not None:
                return f"{place}: {first[1]}"
    return f"{place}: {s.spoilt() or 'the loss itself'}"
