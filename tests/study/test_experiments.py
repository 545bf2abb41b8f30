"""The experiments: what they measure against plain loops, and that their arms write what their names say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from espalier.data import build_source
from espalier.errors import EspalierError
from espalier.init import depthwise_layers
from espalier.models import build_model
from espalier.nn import mixing_matrix
from espalier.recipes import ARMS, INITS, Recipe, get_recipe
from espalier.study import launch, plan_study, summarise
from espalier.study.record import Record, recipe_digest
from espalier.train.build import build_bare_model, build_run_model
from espalier.train.evaluate import evaluate
from espalier.train.losses import build_loss
from experiments.capacity import accuracy_by_length, longest_copied, longest_length
from experiments.convmixer import EQUAL_PARAMETERS, NETS
from experiments.experiment import Experiment
from experiments.filters import SWITCHES, convmixer, switch_arms
from experiments.lag import copying_lag_share
from experiments.nets import CifarResNet, MLPMixer
from experiments.order import ORDER
from experiments.recall import SSM_PARTS, mqar, ssm_part_arms
from experiments.trained_filters import distances, filter_picture, gains
from experiments.windows import log_width_ratio, width_near_best, width_solving

LAYER_PARTS = {
    "decay": ("A_log",),
    "delta": ("dt_proj.bias",),
    "correlate": ("x_proj.weight",),
    "convolution": ("conv1d.weight", "conv1d.bias"),
}
TINY = Recipe(
    name="tiny",
    dataset="copying",
    data_args={"vocab_size": 6, "length": 4, "steps_per_epoch": 2, "eval_examples": 8},
    model="sequence",
    model_args={"dim": 8, "pattern": "mamba2", "state_size": 4, "head_dim": 8},
    epochs=1,
    batch_size=8,
)


# What the data set fixes, so that a model is built without its files.
SIZES = {
    "cifar10": {"num_classes": 10, "in_chans": 3, "img_size": 32},
    "fashion_mnist": {"num_classes": 10, "in_chans": 1, "img_size": 28},
    "tinyshakespeare": {"vocab_size": 65},
}


@pytest.mark.parametrize("experiment", ORDER, ids=lambda experiment: experiment.name)
def test_the_model_of_every_arm_can_be_built(experiment: Experiment, tmp_path: Path) -> None:
    trials = {trial.arm: trial for trial in experiment.first(tmp_path).trials()}
    assert trials.keys() == set(experiment.arms)
    built = set()
    for trial in trials.values():
        recipe = trial.recipe
        if "aoc" in trial.arm or "soc" in trial.arm:
            pytest.importorskip("orthogonium")
        given = repr((recipe.model, recipe.model_args))
        if given in built:
            continue
        built.add(given)
        known = SIZES.get(recipe.dataset)
        model_args = {**(known or build_source(recipe).model_args), **recipe.model_args}
        assert sum(p.numel() for p in build_bare_model(recipe, model_args).parameters()) > 0


@pytest.mark.parametrize("experiment", [each for each in ORDER if each.metric], ids=lambda each: each.name)
def test_scores_by_an_experiments_own_figure_are_summarised(experiment: Experiment, tmp_path: Path) -> None:
    records = [
        Record(
            experiment.name, trial.arm, trial.lr, trial.seed, recipe_digest(trial.recipe), "test/accuracy", 0.5, False,
            1, 1, 1.0, 0.1, (), {experiment.metric: 0.25 + trial.seed / 100},
        )
        for trial in experiment.first(tmp_path).trials()
        if isinstance(trial.recipe, Recipe)
    ]  # fmt: skip
    study = experiment.study(tmp_path, records)
    assert all(trial.finished for trial in study.trials() if trial.seed < experiment.seeds)
    summary = summarise(experiment.first(tmp_path, records))
    assert summary.metric == experiment.metric
    assert summary.arms[0].score.mean == pytest.approx(0.25 + (experiment.seeds - 1) / 200)


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
    # The longest is that of the ladder, whose ends are 1 and 16 for a length of 4.
    assert longest_copied(run)["longest"] in (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16)


def test_runs_without_lengths_are_refused(tmp_path: Path) -> None:
    sizes = {"embed_dim": 8, "depth": 1, "num_heads": 1, "patch_size": 4}
    recipe = Recipe(name="r", epochs=1, model_args=sizes, data_args={"train_limit": 128, "test_limit": 10})
    study = plan_study(recipe, ["default"], [1e-3], [0], tmp_path)
    launch(study, workers=0)
    run = summarise(tmp_path).run("default", 1e-3, 0)
    assert run is not None
    with pytest.raises(EspalierError, match="dataset 'digits' has no lengths"):
        accuracy_by_length(run, [3])


def changed_parameters(recipe: Recipe, changes: Mapping[str, Any]) -> set[str]:
    """Return the names of the parameters that an arm starts from other values than the default does."""
    source = build_source(recipe)
    base, _ = build_run_model(recipe, source)
    model, _ = build_run_model(replace(recipe, **changes), source)
    pairs = zip(base.named_parameters(), model.named_parameters(), strict=True)
    return {name for (name, before), (_, after) in pairs if not torch.equal(before, after)}


def test_sixteen_combinations_of_parts_write_what_they_name() -> None:
    recipe = get_recipe("copy_mamba1")
    recipe = replace(recipe, model_args={**recipe.model_args, "dim": 16})
    arms = ssm_part_arms()
    assert len({str(sorted(changes.get("init_args", {}).items(), key=str)) for changes in arms.values()}) == 16
    for arm, changes in arms.items():
        parts = arm.removeprefix("ssm-").split("+") if arm != "default" else []
        assert set(parts) <= set(SSM_PARTS)
        expected = {f"layers.{i}.mixer.{name}" for i in (0, 1) for part in parts for name in LAYER_PARTS[part]}
        assert changed_parameters(recipe, changes) == expected, arm
    whole = changed_parameters(recipe, ARMS["mimetic-ssm"])
    assert whole == changed_parameters(recipe, arms["ssm-decay+delta+correlate"])
    assert changed_parameters(recipe, ARMS["mimetic-ssm-one"]) == {n for n in whole if n.startswith("layers.0.")}
    assert changed_parameters(recipe, ARMS["mimetic-ssm-last"]) == {n for n in whole if n.startswith("layers.1.")}


@pytest.mark.parametrize("freeze", ["", "depthwise"])
def test_every_switch_departs_from_the_closed_form_in_that_alone(freeze: str) -> None:
    arms = switch_arms(freeze)
    assert next(iter(arms)) == "covariance"
    assert {changes["freeze"] for changes in arms.values()} == {freeze}
    shape = {"num_classes": 10, "in_chans": 3, "img_size": 32}

    def filters(arm: str) -> list[torch.Tensor]:
        recipe = convmixer(5, 2)
        model = build_model(recipe.model, **{**recipe.model_args, "dim": 24, "depth": 3}, **shape)
        INITS[arms[arm]["init"]](model, generator=torch.Generator().manual_seed(1), **arms[arm].get("init_args", {}))
        return [layer.weight for _, layer in depthwise_layers(model)]

    default = filters("covariance")
    for name in SWITCHES:
        departed = filters(f"covariance-{name}")
        assert any(not torch.equal(ours, theirs) for ours, theirs in zip(departed, default, strict=True)), name


def test_asked_recall_is_the_same_task_with_the_same_loss() -> None:
    plain = replace(mqar("mamba2", length=32, pairs=3), dataset="mqar", model="sequence")
    plain = replace(plain, data_args={**plain.data_args, "vocab_size": 64, "eval_examples": 8})
    args = {name: value for name, value in plain.model_args.items() if name != "asked"}
    asked = replace(plain, dataset="asked_mqar", model="asked_sequence")
    plain = replace(plain, model_args=args)
    sources = build_source(plain), build_source(asked)
    models = [build_run_model(recipe, source)[0] for recipe, source in zip((plain, asked), sources, strict=True)]
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(ours, theirs)
    losses, scores = [], []
    for recipe, source, model in zip((plain, asked), sources, models, strict=True):
        inputs, targets = source.train_batch(0, 1, 2, 16)
        loss = build_loss(recipe)(model(inputs), targets)
        loss.backward()
        losses.append(loss.item())
        scores.append(evaluate(model, source, build_loss(recipe), 8))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)


@pytest.mark.parametrize("name", NETS)
def test_nets_have_the_size_that_the_page_says(name: str) -> None:
    recipe = replace(EQUAL_PARAMETERS.recipe, **NETS[name])
    model = build_model(recipe.model, **recipe.model_args, num_classes=10, in_chans=3, img_size=32)
    assert 260_000 < sum(parameter.numel() for parameter in model.parameters()) < 340_000
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_mixer_and_residual_network_against_plain_loops() -> None:
    torch.manual_seed(0)
    mixer = MLPMixer(6, 1, 4, 5, 7, img_size=8).double()
    image = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    tokens = [mixer.stem(image)[0, :, row, column].detach().clone() for row in range(2) for column in range(2)]
    block = mixer.blocks[0]
    normed = [block.norm1(token) for token in tokens]
    for channel in range(6):
        added = block.tokens(torch.stack([token[channel] for token in normed])).detach()
        tokens = [
            torch.cat([t[:channel], (t[channel] + added[i])[None], t[channel + 1 :]]) for i, t in enumerate(tokens)
        ]
    tokens = [token + block.channels(block.norm2(token)) for token in tokens]
    expected = mixer.head(sum(mixer.norm(token) for token in tokens) / 4)
    torch.testing.assert_close(mixer(image)[0], expected)
    # ResNet-20 has 0.27 million parameters (arXiv 1512.03385, table 6), 19 convolutions and one linear layer.
    resnet = CifarResNet(3)
    assert round(sum(p.numel() for p in resnet.parameters()) / 1e6, 2) == 0.27
    assert sum(isinstance(module, torch.nn.Conv2d) for module in resnet.modules()) == 19
    with pytest.raises(EspalierError, match="patch_size 3 does not divide"):
        MLPMixer(6, 1, 3, 5, 7, img_size=8)


def test_share_on_the_right_lag_against_a_plain_loop(tmp_path: Path) -> None:
    source = build_source(TINY)
    model, _ = build_run_model(TINY, source)
    inputs, _ = source.examples(4, 2)
    caught = []
    mixer = model.layers[0].mixer
    handle = mixer.register_forward_pre_hook(lambda m, args: caught.append(args[0].detach()))
    model(inputs)
    handle.remove()
    matrices = mixing_matrix(mixer, caught[0]).abs()
    shares = []
    for matrix in matrices.flatten(0, 1):
        places = range(5, 10)  # the bar and the symbols of the answer; symbols stand four tokens before
        shares.append(sum(matrix[t, t - 4].item() for t in places) / sum(matrix[t].sum().item() for t in places))
    assert copying_lag_share(model, source, 2) == pytest.approx(sum(shares) / len(shares), rel=1e-4)


def test_widths_of_windows_by_hand() -> None:
    means = {1e-4: 0.5, 1e-3: 0.93, 1e-2: 0.94, 1e-1: 0.95}
    assert width_near_best(means) == pytest.approx(100)
    assert width_solving(means) == pytest.approx(100)
    assert width_solving({1e-3: 0.1}) == 1
    wide = {lr: dict.fromkeys(range(4), mean) for lr, mean in means.items()}
    narrow = {lr: dict.fromkeys(range(4), 0.95 if lr == 1e-2 else 0.1) for lr in means}
    for width in (width_near_best, width_solving):
        interval = log_width_ratio(wide, narrow, width)
        assert (interval.mean, interval.low, interval.high, interval.n) == pytest.approx((2, 2, 2, 4))
    # One seed of four solves at every rate: whether a resample's mean does depends on which seeds it has.
    mixed = {lr: {0: 1.0, 1: 1.0, 2: 1.0, 3: 0.5 if lr < 1e-3 else 1.0} for lr in means}
    interval = log_width_ratio(mixed, narrow, width_solving)
    assert (interval.mean, interval.low, interval.high) == pytest.approx((2, 2, 3))
    assert log_width_ratio({1e-3: {0: 1.0}}, {1e-3: {1: 1.0}}, width_solving) is None


@pytest.mark.parametrize("init", ["covariance", "default"])
def test_filters_of_the_closed_form_are_told_from_white_ones(init: str) -> None:
    """Enough filters to be sure, drawn from the closed form or independently: the figure's sign says which."""
    nets = []
    for seed in (0, 1):
        net = build_model("convmixer", dim=400, depth=3, kernel_size=5, patch_size=2, num_classes=2)
        net.init_weights(torch.Generator().manual_seed(seed))  # type: ignore[operator]
        INITS[init](net, torch.Generator().manual_seed(seed))
        nets.append(net)
    found = distances(nets)
    assert [row["seed"] for row in found["rows"]] == [0] * 3 + [1] * 3
    gain = gains(found["rows"])
    assert gain.low > 0.3 if init == "covariance" else gain.high < -0.3
    middle = found["maps"][1]
    assert max(middle["variance measured"]) == 1
    assert filter_picture(found["maps"]).count("<rect") == 1 + 3 * 4 * 25
