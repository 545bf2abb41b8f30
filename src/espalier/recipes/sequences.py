"""Sequence recipes: recall tasks on which state-space models differ, and text on which they should not."""

from __future__ import annotations

from espalier.recipes.base import Recipe, register_recipe


@register_recipe
def copy_mamba1() -> Recipe:
    """Return a two-layer Mamba-1 that copies strings of up to 20 symbols: token accuracy at length 20.

    Below a minute on one CPU core; splits at 40 and 80 symbols beside it. ``espalier train copy_mamba1``; longer with
    ``--data-args.length 50 --model-args.state-size 64 --epochs 80``.
    """
    return Recipe(
        name="copy_mamba1",
        dataset="copying",
        data_args={"vocab_size": 16, "length": 20, "steps_per_epoch": 100},
        model="sequence",
        model_args={"dim": 64, "pattern": "mamba1*2", "state_size": 16},
        epochs=8,
        batch_size=64,
        lr=4e-3,
        clip_norm=1.0,
        eval_every=2,
    )
