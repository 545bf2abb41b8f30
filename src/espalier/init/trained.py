"""Do a model's weights look trained? ``structure_`` says so before it overwrites them."""

from __future__ import annotations

import math
import re
import warnings

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from espalier.contents import without_numbers

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
"""Torch's own layers of normalisation; a class that is made on one may be called anything."""
_NORM = re.compile(r"norm|^ln", re.IGNORECASE)
# Gains of a layer this narrow say too little.
_FEWEST = 8


class TrainedWeightsWarning(UserWarning):
    """Structure is about to be written over weights that look trained; nothing is written yet."""


def drawn_around_zero(mean: float, std: float, count: int) -> bool:
    """Return whether so many gains look like weights: small, and as many below zero as above.

    The mean of noise lies within 3 of its own deviations, std/√count.
    """
    return 0 < std < 0.3 and abs(mean) < max(0.3, min(1.0, 3 / math.sqrt(count))) * std


def warn_if_trained(model: nn.Module) -> None:
    """Warn if at least half of the model's normalisation layers have trained gains.

    Every library starts gains at a constant, and whatever brought trained weights into the model (``from_pretrained``,
    ``create_model(pretrained=True)``, ``load_state_dict``) brought theirs, so no flag of any library is needed. Gains
    drawn from noise around zero do not count: no training does that to them.
    """
    moved, count = [], 0
    for name, module in model.named_modules():
        # Not by its attribute: a parametrised weight is computed whenever it is asked for.
        gain = dict([*module._buffers.items(), *module._parameters.items()]).get("weight")
        is_norm = isinstance(module, NORMS) or _NORM.search(type(module).__name__)
        if not (is_norm and isinstance(gain, Tensor)):
            continue
        gain = gain.to_local() if hasattr(gain, "to_local") else gain
        if gain.ndim != 1 or gain.numel() < _FEWEST or without_numbers(gain) or not gain.is_floating_point():
            continue
        count += 1
        gain = gain.detach().double()
        around_zero = drawn_around_zero(float(gain.mean()), float(gain.std()), gain.numel())
        if torch.isfinite(gain).all() and gain.min() < gain.max() and not around_zero:
            moved.append(name)
    if moved and 2 * len(moved) >= count:
        warnings.warn(
            f"these weights look trained (gains of {len(moved)} of {count} normalisation layers, such as {moved[0]}, "
            "are no fresh start's): structure_ overwrites what attention, filters or state-space layers have learnt; "
            "give it a fresh model, or ignore espalier.init.TrainedWeightsWarning",
            TrainedWeightsWarning,
            stacklevel=5,
        )
