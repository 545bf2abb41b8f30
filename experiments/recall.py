"""Recall: what the mimetic start of state-space models does (docs/results/recall.md).

    python experiments/queue.py --only recall-mqar-mamba2 --deadline 2h

Strings and nets are small, so that a trial takes one to four minutes of one core. Length, vocabulary, width and number
of pairs of multi-query recall are zoology's (arXiv 2312.04927); its 64 epochs of 100,000 examples are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from typing import Any

from espalier.recipes import Recipe, get_recipe
from experiments import asked  # noqa: F401  registers its model and its data
from experiments.capacity import longest_copied
from experiments.experiment import Experiment

# A factor of 100 in eight steps, for every arm: a default Mamba is known to need the right rate (arXiv 2508.19029).
EIGHT_RATES = (1e-4, 2e-4, 4e-4, 8e-4, 1.5e-3, 3e-3, 6e-3, 1e-2)
SIX_RATES = (3e-4, 1e-3, 2e-3, 4e-3, 1e-2, 2e-2)
ARMS = ("default", "mimetic-ssm")

# The parts of mimetic state-space initialisation as MimeticSSM takes them: (left alone, written).
SSM_PARTS: Mapping[str, tuple[Any, Any]] = {
    "decay": (None, 8.0),
    "delta": (None, 1.0),
    "correlate": (None, 1.0),
    "convolution": (False, True),
}
PATTERNS: Mapping[str, Mapping[str, Any]] = {
    "mamba1": {"pattern": "mamba1*2", "state_size": 16},
    "mamba2": {"pattern": "mamba2*2", "state_size": 32, "head_dim": 64},
    "hybrid": {"pattern": "mamba2*3 attention", "state_size": 32, "head_dim": 64, "num_heads": 1},
    "attention": {"pattern": "attention*2", "num_heads": 1},
}


def ssm_part_arms() -> dict[str, Mapping[str, Any]]:
    """Return the arms that write some of the four parts: none (``default``), ``ssm-decay``, ``ssm-decay+delta``, …"""
    arms: dict[str, Mapping[str, Any]] = {"default": {}}
    for chosen in list(product((False, True), repeat=len(SSM_PARTS)))[1:]:
        name = "ssm-" + "+".join(part for part, written in zip(SSM_PARTS, chosen, strict=True) if written)
        parts = {part: SSM_PARTS[part][written] for part, written in zip(SSM_PARTS, chosen, strict=True)}
        arms[name] = {"init": "mimetic_ssm", "init_args": parts}
    return arms


def copying(name: str = "copy_mamba1", **model_args: Any) -> Recipe:
    """Return copying of strings of up to 12 symbols from 9, 600 steps of 32: about a minute on one core."""
    recipe = get_recipe(name)
    short = {**recipe.data_args, "vocab_size": 12, "length": 12, "eval_examples": 256}
    args = {**recipe.model_args, **model_args}
    return replace(recipe, epochs=6, batch_size=32, data_args=short, model_args=args, threads=1)


def mqar(net: str, length: int = 64, pairs: int = 4, epochs: int = 20) -> Recipe:
    """Return multi-query recall with 8,192 tokens and width 64, 100 steps of 64 examples an epoch."""
    data_args = {"vocab_size": 8192, "length": length, "pairs": pairs, "steps_per_epoch": 100, "eval_examples": 256}
    return replace(
        get_recipe("mqar_mamba2"),
        dataset="asked_mqar",
        data_args=data_args,
        model="asked_sequence",
        model_args={"dim": 64, "asked": pairs, **PATTERNS[net]},
        batch_size=64,
        epochs=epochs,
        threads=1,
    )


WINDOW = Experiment(
    "recall-window-mamba1",
    "Learning-rate window: copying, Mamba-1",
    copying(),
    ARMS,
    EIGHT_RATES,
    seeds=10,
    minutes=1.2,
)
MQAR = {
    net: Experiment(
        f"recall-mqar-{net}",
        f"Multi-query recall, length 64, 4 pairs: {net}",
        mqar(net),
        ARMS,
        SIX_RATES,
        5,
        minutes=2.5,
    )
    for net in ("mamba2", "mamba1", "hybrid")
}
CONTROL = Experiment(
    "recall-mqar-attention",
    "Multi-query recall, length 64, 4 pairs: attention, the control",
    mqar("attention"),
    ("default",),
    (1e-3, 2e-3, 4e-3),
    seeds=3,
    minutes=2.5,
)
PARTS = Experiment(
    "recall-parts",
    "Which part matters: decay, step, correlated maps, convolution in all combinations; copying, Mamba-1",
    copying(),
    ssm_part_arms(),
    (4e-3, 1e-2),
    seeds=3,
    minutes=1.2,
    extend=False,
)
LAYERS = Experiment(
    "recall-layers",
    "Mimetic structure in no layer, the first, the last, all; copying, Mamba-1",
    copying(),
    ("default", "mimetic-ssm-one", "mimetic-ssm-last", "mimetic-ssm"),
    (4e-3, 1e-2),
    seeds=5,
    minutes=1.2,
)
CAPACITY = [
    Experiment(
        f"recall-capacity-state{size}",
        f"The longest string that is copied with 90 % of its tokens right: Mamba-2, state {size}",
        copying("copy_mamba2", state_size=size),
        ARMS,
        (1e-3, 4e-3),
        seeds=3,
        minutes=1.3,
        extend=False,
        measure=longest_copied,
        metric="longest",
    )
    for size in (8, 16, 32, 64, 128)
]
TEXT = Experiment(
    "recall-text",
    "Characters of tiny Shakespeare, where recall is not the point: Mamba-2",
    get_recipe("shakespeare_mamba2"),
    ARMS,
    (1e-3, 3e-3, 1e-2),
    seeds=3,
    minutes=1.5,
)
ACROSS = [
    Experiment(
        f"recall-across-{family}-layers{layers}-state{state}-width{width}",
        f"Copying across architectures: {family}, {layers} layers, state {state}, width {width}",
        copying(f"copy_{family}", pattern=f"{family}*{layers}", state_size=state, dim=width),
        ARMS,
        (3e-3, 1e-2),
        seeds=3,
        minutes=0.6 * layers * width / 64 * (1 + state / 64),
        extend=False,
    )
    for family, layers, state, width in product(("mamba1", "mamba2"), (1, 2, 4), (16, 64), (64, 128))
]
