"""The order of worth: what the queue runs first when nobody knows how long it may run.

What no page shows yet comes before more of what is known, and cheap before dear: a row of the table that is missing
says less than one with a wide interval.
"""

from __future__ import annotations

from collections.abc import Sequence

from experiments import attention, convmixer, filters, recall, robustness
from experiments.experiment import Experiment

_ACROSS = sorted(recall.ACROSS, key=lambda experiment: experiment.minutes)

ORDER: Sequence[Experiment] = (
    recall.MQAR["mamba2"],
    recall.CONTROL,
    recall.WINDOW,
    filters.WORTH[0],
    robustness.EQUAL_EPOCHS,
    robustness.HOURS["cifar10"],
    *robustness.MINUTES.values(),
    *filters.TRANSFER,
    robustness.SCALE,
    filters.CONVNEXT,
    robustness.EQUAL_TIME,
    robustness.LAYERS_CIFAR10,
    *_ACROSS[:8],
    recall.MQAR["mamba1"],
    recall.MQAR["hybrid"],
    recall.LAYERS,
    recall.TEXT,
    convmixer.EQUAL_PARAMETERS,
    convmixer.PATCHES["convmixer"],
    attention.SMALL,
    *_ACROSS[8:],
    recall.LONGER,
    attention.CIFAR10,
    convmixer.PATCHES["vit"],
    *filters.WORTH[1:],
    recall.PARTS,
    *recall.CAPACITY,
    *filters.SWITCHED,
    robustness.HOURS["fashion"],
)
