"""The losses that a recipe can name, as sums over the batch, so that micro-batches and ranks add up exactly."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from espalier.annotations import refuse_misfits
from espalier.data.source import IGNORED
from espalier.errors import EspalierError, require_known
from espalier.recipes.base import Recipe

Loss = Callable[[Tensor, Tensor], Tensor]

_NOT_ONE = 0.01
"""How far from 1 the sum of class probabilities may be: those of a teacher in half precision are a little off."""


def cross_entropy(logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Return −Σ p log softmax(logits), with p the targets mixed with ``label_smoothing`` of the uniform distribution.

    Args:
        logits: scores ``(N, C)``.
        targets: class indices ``(N,)``, −100 where there is no loss, or class probabilities ``(N, C)``.
        label_smoothing: share of the uniform distribution.
    """
    return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing, ignore_index=IGNORED)


def multi_margin(logits: Tensor, targets: Tensor, *, margin: float = 0.5) -> Tensor:
    """Return Σ_i 1/C Σ_{j≠y} max(0, margin − f_y + f_j), the loss of the Cayley paper's nets (arXiv 2104.07167).

    Args:
        logits: scores ``(N, C)``.
        targets: class indices ``(N,)``, −100 where there is no loss.
        margin: wanted distance between the right score and every other.

    Raises:
        EspalierError: the targets are probabilities.
    """
    _expect_indices(targets, "multi_margin")
    each = F.multi_margin_loss(logits, targets.clamp_min(0), margin=margin, reduction="none")
    # Masked, not selected: selecting would make the host wait for the device at every step.
    return each.masked_fill(targets == IGNORED, 0.0).sum()


def tempered_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 0.25,
    offset: float = math.sqrt(2.0),
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return t·CE((f − offset·y)/t, y): cross-entropy with a wanted margin, for Lipschitz nets (arXiv 2208.03160).

    The offset is taken from the score of the right class, so that a margin below it still costs; a small temperature
    t makes the loss stop pulling soon after.

    Args:
        logits: scores ``(N, C)``.
        targets: class indices ``(N,)``, −100 where there is no loss, or class probabilities ``(N, C)``.
        temperature: t > 0.
        offset: margin in units of the scores.
        label_smoothing: share of the uniform distribution.
    """
    tempered = _tempered(logits, targets, temperature, offset)
    return temperature * cross_entropy(tempered, targets, label_smoothing=label_smoothing)


def logit_annealing(
    logits: Tensor, targets: Tensor, *, temperature: float = 0.75, offset: float = 2.0, beta: float = 5.0
) -> Tensor:
    """Return Σ −t·(1 − p_y)^β·log p_y with p = softmax((f − offset·y)/t), the loss of BRONet (arXiv 2505.15174).

    Tempered cross-entropy, annealed: an example whose margin is large has p_y near 1 and ceases to count, so that a net
    of limited slope spends it on the others. β = 0 gives ``tempered_cross_entropy``.

    Args:
        logits: scores ``(N, C)``.
        targets: class indices ``(N,)``, −100 where there is no loss.
        temperature: t > 0.
        offset: ξ, in units of the scores.
        beta: β, 0 or at least 1: how soon an example ceases to count.

    Raises:
        EspalierError: the targets are probabilities.
    """
    _expect_indices(targets, "logit_annealing")
    tempered = _tempered(logits, targets, temperature, offset)
    each = F.cross_entropy(tempered, targets, reduction="none", ignore_index=IGNORED)
    # 1 − p_y without cancellation where p_y is near 1.
    return temperature * (torch.expm1(-each).neg() ** beta * each).sum()


def _tempered(logits: Tensor, targets: Tensor, temperature: float, offset: float) -> Tensor:
    """Return (f − offset·y)/t."""
    truth = targets if targets.is_floating_point() else F.one_hot(targets.clamp_min(0), logits.shape[-1])
    return (logits - offset * truth.to(logits.dtype)) / temperature


def _expect_indices(targets: Tensor, loss: str) -> None:
    if targets.is_floating_point():
        raise EspalierError(f"loss {loss!r} needs class indices: turn mixup and cutmix off or use 'cross_entropy'")


LOSSES: Mapping[str, Callable[..., Tensor]] = {
    "cross_entropy": cross_entropy,
    "logit_annealing": logit_annealing,
    "multi_margin": multi_margin,
    "tempered_cross_entropy": tempered_cross_entropy,
}


# What must hold of arguments: with other values a loss rewards the wrong class, or is no number.
_RULES: Mapping[str, tuple[Callable[[float], bool], str]] = {
    "beta": (lambda value: value == 0 or value >= 1, "from 1, or 0"),
    "margin": (lambda value: value > 0, "above 0"),
    "temperature": (lambda value: value > 0, "above 0"),
}


def build_loss(recipe: Recipe, *, smoothing: bool = True) -> Loss:
    """Return the recipe's loss: (logits ``(B, C)`` or ``(B, L, C)``, targets) → the sum over the batch, in float32.

    Args:
        recipe: gives ``loss``, ``loss_args`` and ``label_smoothing``.
        smoothing: smooth the labels as the recipe says; evaluation does not.

    Raises:
        EspalierError: unknown loss or loss argument, a value that it cannot have, or label smoothing with a loss that
            has none.
    """
    require_known("loss", recipe.loss, LOSSES)
    function = LOSSES[recipe.loss]
    arguments: dict[str, Any] = dict(recipe.loss_args)
    taken = {name for name, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}
    known = taken - {"label_smoothing"}
    for name in arguments:
        require_known(f"argument of loss {recipe.loss!r}:", name, known or {"none"})
    refuse_misfits(f"loss {recipe.loss!r}", function, arguments)
    for name, value in arguments.items():
        if name in _RULES and not _RULES[name][0](value):
            raise EspalierError(f"loss {recipe.loss!r}: {name} is {value}: give a number {_RULES[name][1]}")
    if recipe.label_smoothing:
        if taken == known:
            raise EspalierError(f"label_smoothing {recipe.label_smoothing} has no meaning for {recipe.loss!r}: set 0")
        if smoothing:
            arguments["label_smoothing"] = recipe.label_smoothing
    return partial(_flat, partial(function, **arguments))


def _flat(function: Loss, logits: Tensor, targets: Tensor) -> Tensor:
    if logits.dim() > 2:
        logits, targets = logits.flatten(0, -2), targets.flatten()
    if targets.device.type == "cpu":  # a GPU would have to be waited for
        _check_targets(logits, targets)
    total = function(logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits, targets)
    # max(0, NaN) is 0: a margin loss takes what is no number for the best of scores. −∞ is a score, of a masked class.
    largest = logits.detach().amax(-1)
    if not targets.is_floating_point():
        largest = largest.masked_fill(targets == IGNORED, 0.0)
    return torch.where((largest < math.inf).all(), total, math.nan)


def _check_targets(logits: Tensor, targets: Tensor) -> None:
    if not targets.is_floating_point():
        wrong = targets[((targets < 0) & (targets != IGNORED)) | (targets >= logits.shape[-1])]
        if wrong.numel():
            raise EspalierError(
                f"the data have a target of {int(wrong[0])}, and the model gives {logits.shape[-1]} scores: number the "
                f"classes from 0 to {logits.shape[-1] - 1} ({IGNORED} for no target), or give it more classes"
            )
    elif targets.shape == logits.shape:  # of numbers that are no probabilities, the losses are numbers all the same
        wrong = targets[(targets < 0).any(1) | ~((targets.sum(1) - 1).abs() < _NOT_ONE)]
        if len(wrong):
            raise EspalierError(
                f"the data have a target of {wrong[0].tolist()!s:.60}, and decimals are class probabilities, from "
                "0 and with the sum 1: give these, or numbers of classes"
            )


def target_count(targets: Tensor) -> Tensor | int:
    """Return how many terms the loss sums: rows of probabilities, or examples and positions whose target is not −100.

    The count of indices stays a tensor, so that the device is not waited for.
    """
    return targets.shape[0] if targets.is_floating_point() else (targets != IGNORED).sum()
