"""Tiny experiments for the tests of the queue: ``--order queue_order:ORDER``."""

from __future__ import annotations

from dataclasses import replace

from espalier.recipes import get_recipe
from experiments.experiment import Experiment

TINY = replace(
    get_recipe("digits_convmixer"),
    data_args={"train_limit": 64, "test_limit": 32},
    model_args={"dim": 8, "depth": 1, "kernel_size": 3, "patch_size": 2},
    batch_size=32,
    epochs=1,
)
ORDER = (
    Experiment("tiny", "Two arms", TINY, ("default", "covariance"), (1e-2,), seeds=1, minutes=0.1, extend=False),
    Experiment("broken", "No data", replace(TINY, dataset="folder"), ("default",), (1e-2,), seeds=1, minutes=0.1),
)
ENDLESS = (Experiment("endless", "Long", replace(TINY, epochs=10**6), ("default",), (1e-2,), seeds=2, minutes=999.0),)
