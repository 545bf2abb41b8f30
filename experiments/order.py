"""The order of worth: what the queue runs first when nobody knows how long it may run.

What no page shows yet comes before more of what is known, and cheap before dear: a row of the table that is missing
says less than one with a wide interval.
"""

from __future__ import annotations

from collections.abc import Sequence

from experiments import recall
from experiments.experiment import Experiment

ORDER: Sequence[Experiment] = (
    recall.CONTROL,
    recall.MQAR["mamba2"],
    recall.WINDOW,
    recall.MQAR["mamba1"],
    recall.MQAR["hybrid"],
    *recall.ACROSS,
    recall.TEXT,
    recall.LAYERS,
    recall.PARTS,
)
