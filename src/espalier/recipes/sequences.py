"""Sequence recipes: recall tasks on which state-space models differ, and text on which they should not."""

from __future__ import annotations

from dataclasses import replace

from espalier.recipes.base import Recipe, register_recipe


@register_recipe
def copy_mamba1() -> Recipe:
    """A two-layer Mamba-1 that copies strings of up to 20 symbols: token accuracy at length 20.

    About a minute on one CPU core: ``espalier train copy_mamba1``. Splits at 40 and 80 symbols stand beside it. For a
    GPU: ``--data-args.length 50 --data-args.vocab-size 29 --model-args.state-size 64 --epochs 100``.
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
        threads=1,
    )


@register_recipe
def copy_mamba2() -> Recipe:
    """A two-layer Mamba-2 that copies strings of up to 20 symbols: token accuracy at length 20.

    About a minute on one CPU core: ``espalier train copy_mamba2``. Splits at 40 and 80 symbols stand beside it. For a
    GPU: ``--data-args.length 50 --data-args.vocab-size 29 --model-args.state-size 128 --epochs 100``.
    """
    model_args = {"dim": 64, "pattern": "mamba2*2", "state_size": 32, "head_dim": 64}
    return replace(copy_mamba1(), name="copy_mamba2", model_args=model_args)


@register_recipe
def mqar_mamba2() -> Recipe:
    """A two-layer Mamba-2 that recalls 8 pairs within 64 tokens: token accuracy over the queries.

    Minutes on one CPU core: ``espalier train mqar_mamba2``. Splits at 128 and 256 tokens with as many pairs
    stand beside it. For a GPU: ``--data-args.vocab-size 8192 --data-args.length 256 --data-args.pairs 16 --epochs 100
    --model-args.dim 128 --eval-batch-size 32``.
    """
    data_args = {"vocab_size": 128, "length": 64, "pairs": 8, "steps_per_epoch": 100}
    return replace(copy_mamba2(), name="mqar_mamba2", dataset="mqar", data_args=data_args)


@register_recipe
def recall_hybrid() -> Recipe:
    """A Mamba-2 block and an attention block that recall 8 pairs within 64 tokens: token accuracy.

    Minutes on one CPU core: ``espalier train recall_hybrid``. Without positions in attention: the convolution
    tells neighbours apart. For a GPU: the same changes as ``mqar_mamba2``.
    """
    model_args = {"dim": 64, "pattern": "mamba2 attention", "state_size": 32, "num_heads": 1, "rope": False}
    return replace(mqar_mamba2(), name="recall_hybrid", model_args=model_args, epochs=6)


@register_recipe
def shakespeare_mamba2() -> Recipe:
    """A two-layer Mamba-2 on the characters of tiny Shakespeare: accuracy on the last tenth of the text.

    The control: little here depends on recall. Minutes on one CPU core: ``espalier train shakespeare_mamba2
    --data FILE``, or with ``ESPALIER_DATA`` set. For a GPU: ``--data-args.length 256 --model-args.dim 384
    --model-args.pattern mamba2*6 --epochs 50``.
    """
    return replace(
        copy_mamba2(),
        name="shakespeare_mamba2",
        dataset="tinyshakespeare",
        data_args={"length": 128, "steps_per_epoch": 100, "eval_examples": 128},
        epochs=6,
        batch_size=24,
        eval_batch_size=64,
    )


@register_recipe
def shakespeare_attention() -> Recipe:
    """A four-layer causal transformer on the characters of tiny Shakespeare: accuracy on the last tenth.

    For the arms of attention: ``espalier compare shakespeare_attention --arms all``. Minutes on one CPU core; for a
    GPU: ``--data-args.length 256 --model-args.dim 384 --model-args.pattern attention*6 --epochs 50``.
    """
    return replace(
        shakespeare_mamba2(),
        name="shakespeare_attention",
        data_args={"length": 96, "steps_per_epoch": 75, "eval_examples": 128},
        model_args={"dim": 64, "pattern": "attention*4", "num_heads": 4, "mlp_ratio": 4.0},
        epochs=4,
        batch_size=16,
        lr=1e-3,
        warmup_epochs=0.5,
    )
