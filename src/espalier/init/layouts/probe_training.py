"""Whether a layer computes in training what it computes in evaluation, in which it is proven."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from espalier.init.layouts.compare import is_near
from espalier.init.layouts.scratch import Call, CannotRunError, run
from espalier.init.layouts.trial import Unproven


def refuse_other_training(twin: nn.Module, call: Call) -> None:
    """Refuse a layer that computes something else in training; dropout is left out.

    Where it draws numbers, or a norm takes its statistics from the batch, that cannot be told.

    Args:
        twin: a scratch copy, inside ``untraced``; it draws no dropout afterwards.
        call: inputs that it runs on.

    Raises:
        Unproven: it does.
    """
    if any(isinstance(part, _BatchNorm) for part in twin.modules()):
        return
    before, begun = run(twin, call), _states()
    twin.train()
    for part in twin.modules():
        if isinstance(part, _DropoutNd):
            part.eval()
        for name in [name for name, value in vars(part).items() if "drop" in name and isinstance(value, float)]:
            setattr(part, name, 0.0)
    try:
        after = run(twin, call)
    except CannotRunError:
        return
    finally:
        twin.eval()
    alike = [a.shape == b.shape and is_near(a, b) for a, b in zip(after, before, strict=False)]
    if _states() == begun and not all(alike):
        raise Unproven("it computes something else in training than in evaluation")


def _states() -> tuple[object, ...]:
    """Return where the generators stand that ``run`` sets to their start."""
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())  # noqa: NPY002
