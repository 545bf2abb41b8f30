"""State capacity: the measured lengths against plain loops, and the table against hand-computed intervals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from espalier.errors import EspalierError
from espalier.recipes import Recipe
from espalier.study import launch, plan_study, summarise
from espalier.study.capacity import Capacity, accuracy_by_length, capacity_table, longest_length, measure_capacity

TINY = Recipe(
    name="tiny",
    dataset="copying",
    data_args={"vocab_size": 6, "length": 4, "steps_per_epoch": 2, "eval_examples": 8},
    model="sequence",
    model_args={"dim": 8, "pattern": "mamba2", "state_size": 4, "head_dim": 8},
    epochs=1,
    batch_size=8,
)


def test_longest_length_equals_a_plain_walk() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        count = int(torch.randint(8, (), generator=generator))
        lengths = (1 + torch.randperm(50, generator=generator)[:count]).tolist()
        accuracies = dict(zip(lengths, (0.8 + 0.3 * torch.rand(count, generator=generator)).tolist(), strict=True))
        reached = [n for n in accuracies if all(accuracies[m] >= 0.9 for m in accuracies if m <= n)]
        assert longest_length(accuracies, 0.9) == max(reached, default=0)


def test_models_are_measured_at_exactly_each_length(tmp_path: Path) -> None:
    study = plan_study(TINY, ["default", "mimetic-ssm"], [1e-2], [0, 1], tmp_path)
    launch(study, workers=0)
    summary = summarise(tmp_path)
    run = summary.run("mimetic-ssm", 1e-2, 1)
    assert run is not None
    found = accuracy_by_length(run, [3, 9], examples=20)
    source, model = run.source(), run.model()
    for length in (3, 9):
        inputs, targets = source.examples(length, 20)  # type: ignore[attr-defined]
        right = asked = 0
        for row, wanted in zip(inputs, targets, strict=True):
            best = model(row[None])[0].argmax(-1)
            asked += length + 1
            right += sum(int(best[place] == wanted[place]) for place in range(length + 1, 2 * length + 2))
        assert found[length] == pytest.approx(right / asked)
    assert torch.is_grad_enabled()
    # Every model reaches nothing, none reaches more than everything: the ladder's ends.
    everything = measure_capacity(summary, threshold=0.0, examples=2)
    assert [(row.state_size, row.arm, row.lr) for row in everything] == [
        (4, "default", 1e-2),
        (4, "mimetic-ssm", 1e-2),
    ]
    assert all(row.lengths == {0: 16, 1: 16} for row in everything)
    assert all(row.lengths == {0: 0, 1: 0} for row in measure_capacity(summary, threshold=1.1, examples=2))


def test_runs_without_lengths_are_refused(tmp_path: Path) -> None:
    sizes = {"embed_dim": 8, "depth": 1, "num_heads": 1, "patch_size": 4}
    recipe = Recipe(name="r", epochs=1, model_args=sizes, data_args={"train_limit": 128, "test_limit": 10})
    study = plan_study(recipe, ["default"], [1e-3], [0], tmp_path)
    launch(study, workers=0)
    run = summarise(tmp_path).run("default", 1e-3, 0)
    assert run is not None
    with pytest.raises(EspalierError, match="dataset 'digits' has no lengths"):
        accuracy_by_length(run, [3])


def test_table_against_hand_computed_intervals() -> None:
    found = [
        Capacity(16, "default", 1e-3, {0: 10, 1: 12, 2: 14}),
        Capacity(16, "mimetic-ssm", 4e-3, {0: 20, 1: 22, 2: 24}),
        Capacity(8, "default", 1e-3, {0: 10, 1: 12, 2: 14}),
        Capacity(8, "mimetic-ssm", None, {}),
    ]
    lines = capacity_table(found).splitlines()
    assert "≥ 90 %" in lines[0]
    # s = 2 over three seeds: ± 4.302653 · 2 / √3 = 4.97; every paired difference is 10.
    assert lines[2:] == [
        "| 8 | default | 0.001 | 12 ± 4.97 | baseline | 3 |",
        "| 8 | mimetic-ssm | – | – | – | 0 |",
        "| 16 | default | 0.001 | 12 ± 4.97 | baseline | 3 |",
        "| 16 | mimetic-ssm | 0.004 | 22 ± 4.97 | +10 [+10, +10] | 3 |",
    ]
    close = [Capacity(8, "default", 1e-3, {0: 10, 1: 12}), Capacity(8, "mimetic-ssm", 1e-3, {0: 12, 1: 11})]
    assert "no difference shown, +0.5 [" in capacity_table(close).splitlines()[-1]
