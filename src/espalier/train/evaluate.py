"""Loss and accuracy of a model over the evaluation splits of a source."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from espalier.data.source import Source
from espalier.errors import EspalierError
from espalier.train.losses import IGNORED, Loss, target_count


@torch.no_grad()
def evaluate(
    model: nn.Module,
    source: Source,
    loss: Loss,
    batch_size: int,
    *,
    mine: slice = slice(None),
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
    before_batch: Callable[[str, int], object] = lambda split, index: None,
    after_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Return ``{split}/loss`` and ``{split}/accuracy`` for every split, in evaluation mode; the mode is put back.

    The accuracy is that of the examples, or positions, with a target; where targets are probabilities, the most
    probable class is the right one. For token targets ``(B, L)``, ``{split}/string_accuracy`` is the share of rows in
    which every position with a target is right.

    Args:
        model: maps inputs to logits ``(B, C)`` or ``(B, L, C)``.
        source: its data, on the model's device.
        loss: the loss as a sum over the batch.
        batch_size: examples per forward pass.
        mine: this process's share of a batch.
        reduce: adds a tensor up over the processes.
        before_batch: called with split and number before a batch is read.
        after_batch: called after every batch; it may raise to stop.

    Raises:
        EspalierError: a split without examples, or without a target.
    """
    was_training = model.training
    model.eval()
    scores: dict[str, float] = {}
    for split in source.eval_splits:
        sums = torch.zeros(5, dtype=torch.float64, device=next(model.parameters()).device)
        tokens = False
        batches = iter(source.eval_batches(split, batch_size))
        for index in itertools.count():
            before_batch(split, index)
            if (batch := next(batches, None)) is None:
                break
            inputs, targets = batch
            tokens = targets.dim() == 2 and not targets.is_floating_point()
            share = targets[mine]
            # Every process runs the model, or those that share its weights would wait for the one that does not.
            logits = model(inputs[mine] if len(share) else inputs.new_zeros(1, *inputs.shape[1:]))
            if len(share):
                sums += _batch_sums(logits, share, loss)
            after_batch()
        loss_sum, count, right, strings_right, strings = reduce(sums).tolist()
        if not count:
            raise EspalierError(f"split {split!r} of the data is empty: give it some examples")
        scores[f"{split}/loss"] = loss_sum / count
        scores[f"{split}/accuracy"] = right / count
        if tokens:
            scores[f"{split}/string_accuracy"] = strings_right / strings
    model.train(was_training)
    return scores


@torch.no_grad()
def confusion_matrix(model: nn.Module, source: Source, split: str, classes: int, batch_size: int) -> Tensor:
    """Return how many examples of each class are taken for each class: int64 ``(classes, classes)``, true class first.

    Args:
        model: maps inputs to logits ``(B, classes)``; in evaluation mode.
        source: its data, with class indices as targets.
        split: one of the source's evaluation splits.
        classes: number of classes.
        batch_size: examples per forward pass.

    Raises:
        EspalierError: the model has another number of logits.
    """
    counts = torch.zeros(classes * classes, dtype=torch.int64)
    for inputs, targets_B in source.eval_batches(split, batch_size):
        logits_BK = model(inputs)
        if logits_BK.shape[-1] != classes:
            raise EspalierError(
                f"the model has {logits_BK.shape[-1]} logits, and the data {classes} classes: match them"
            )
        counts += (targets_B * classes + logits_BK.argmax(-1)).bincount(minlength=classes * classes)
    return counts.view(classes, classes)


def _batch_sums(logits: Tensor, targets: Tensor, loss: Loss) -> Tensor:
    # One small tensor per batch and no .item(): the host never waits for the device within a split.
    labels = targets.argmax(-1) if targets.is_floating_point() else targets
    answered = labels != IGNORED
    right = logits.argmax(-1) == labels
    rows_right = (right | ~answered).reshape(len(targets), -1).all(-1)
    rows_asked = answered.reshape(len(targets), -1).any(-1)
    count = target_count(targets)
    parts = (loss(logits, targets), count, (right & answered).sum(), (rows_right & rows_asked).sum(), rows_asked.sum())
    return torch.stack([torch.as_tensor(part, device=logits.device).double() for part in parts])
