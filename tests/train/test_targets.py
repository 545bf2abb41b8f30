"""Every kind of target that data of one's own may have: losses and accuracies against torch's own means."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.errors import EspalierError
from espalier.recipes import Recipe, get_recipe
from espalier.train import train
from espalier.train.evaluate import evaluate
from espalier.train.losses import build_loss

C = 5
DATA = """
import torch
from torch.utils.data import ConcatDataset, Dataset, TensorDataset

class Pairs(Dataset):  # which does not say how many classes it has
    def __init__(self, images, labels):
        self.pairs = list(zip(images, labels))

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        return self.pairs[index]

def pair(first=0, last=0):
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(48, 1, 8, 8, generator=generator), torch.randint(10, (48,), generator=generator)
    train, test = labels.clone(), labels.clone()
    train[:12], test[-1] = first, last
    return tuple(Pairs(images, labels) for labels in (train, test))
"""


def scores(logits: Tensor, targets: Tensor, batch_size: int = 4) -> dict[str, float]:
    """Evaluate a net that returns its inputs, on logits as inputs."""

    def batches(split: str, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(logits.split(size), targets.split(size), strict=True)

    net = nn.Identity()
    net.register_parameter("of_the_device", nn.Parameter(torch.zeros(())))
    source: Any = SimpleNamespace(eval_splits=("test",), eval_batches=batches)
    return evaluate(net, source, build_loss(Recipe("r")), batch_size)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def tiny(folder: Path, **arguments: int) -> Recipe:
    (folder / "mine.py").write_text(DATA)
    sizes = {"patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 1, "num_classes": 10}
    return replace(
        get_recipe("digits_vit"), dataset=f"{folder}/mine.py:pair", data_args=arguments, model_args=sizes,
        batch_size=48, epochs=1, lr=1e-9, warmup_epochs=0.0,
    )  # fmt: skip


@pytest.mark.parametrize("ignored", [[], [0], [3, 9], [0, 1, 2, 3], [4, 5, 6, 7, 10]])
def test_examples_without_a_target_count_in_no_mean(ignored: list[int]) -> None:
    logits, targets = drawn(11, C), torch.arange(11) % C
    targets[ignored] = -100
    found, kept = scores(logits, targets), targets != -100
    assert found["test/loss"] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-6)
    assert found["test/accuracy"] == pytest.approx((logits.argmax(1) == targets)[kept].double().mean().item())


def test_a_batch_of_tokens_without_a_target_counts_for_nothing() -> None:
    logits, targets = drawn(9, 3, C), torch.arange(27).view(9, 3) % C
    targets[4:8] = -100  # the second batch of four
    found = scores(logits, targets)
    assert found["test/loss"] == pytest.approx(F.cross_entropy(logits.transpose(1, 2), targets).item(), rel=1e-6)
    assert found["test/accuracy"] == pytest.approx((logits.argmax(2) == targets)[targets != -100].double().mean())


def test_probabilities_are_evaluated_by_their_most_probable_class() -> None:
    logits, targets = drawn(11, C), (3 * drawn(C, 11).T).softmax(1)
    found = scores(logits, targets)
    assert found["test/loss"] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-6)
    assert found["test/accuracy"] == pytest.approx((logits.argmax(1) == targets.argmax(1)).double().mean().item())
    assert found.keys() == {"test/loss", "test/accuracy"}


def test_training_averages_over_the_examples_with_a_target(tmp_path: Path) -> None:
    run = train(tiny(tmp_path, first=-100), tmp_path / "run", progress=False)
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(48, 1, 8, 8, generator=generator), torch.randint(10, (48,), generator=generator)
    with torch.no_grad():
        wanted = F.cross_entropy(run.model("start")(images[12:]), labels[12:])
    assert run.rows[-1]["train_loss"] == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize(("arguments", "value"), [({"first": 12}, 12), ({"first": -1}, -1), ({"last": 10}, 10)])
def test_targets_that_are_no_class_are_one_line(tmp_path: Path, arguments: dict[str, int], value: int) -> None:
    with pytest.raises(EspalierError, match=rf"a target of {value}, and the model gives 10 scores: number") as caught:
        train(tiny(tmp_path, **arguments), tmp_path / "run", progress=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("(255 * x).byte(), y", r"\(training\) fails with RuntimeError: Input type"),
        ("x.repeat(1, 3, 1, 1), y", r"\(training\) fails with RuntimeError: .* channels"),
        ("x, y[:, None]", r"targets of shape \(1, 1\) \(training\)"),
        ("x, torch.eye(10)[y]", None),
        ("x, torch.eye(7)[y % 7]", "returns 10 scores, and there are 7 classes"),
        ("x, torch.randn(48, 10)", "decimals are class probabilities, from 0 and with the sum 1"),
        ("x, torch.eye(10)[y] + torch.eye(10)[(y + 1) % 10]", r"a target of \[.*1.0.*\], and decimals are"),
        ("x, torch.full((48, 10), float('nan'))", r"a target of \[nan.*\], and decimals are"),
    ],
)
def test_training_data_of_another_kind_than_the_evaluations_are_one_line_about_the_data(
    change: str, words: str | None, tmp_path: Path
) -> None:
    body = f"""
def other():
    train, test = pair()
    x, y = (torch.stack([item[part] for item in train]) for part in (0, 1))
    return TensorDataset({change}), test
"""
    recipe = tiny(tmp_path)
    with (tmp_path / "mine.py").open("a") as file:
        file.write(body)
    recipe = replace(recipe, dataset=f"{tmp_path}/mine.py:other")
    if words is None:  # probabilities to train on and classes to be held to, as after mixup, are no mistake
        assert train(recipe, tmp_path / "run", progress=False).result is not None
        return
    with pytest.raises(EspalierError, match=words) as caught:
        train(recipe, tmp_path / "run", progress=False)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("bad", [[0.5, 0.6], [1.5, -0.5], [0.0, 0.0], [float("inf"), 0.0], [0.97, 0.0]])
def test_numbers_that_are_no_probabilities_are_never_scored(bad: list[float]) -> None:
    """Among any others, and in the evaluation, too: their loss and accuracy would look like those of a task."""
    targets = torch.tensor([[0.3, 0.7], [1.0, 0.0]] * 5)
    scores(drawn(10, 2), targets + 0.004)  # as near as half precision comes
    targets[7] = torch.tensor(bad)
    with pytest.raises(EspalierError, match="decimals are class probabilities"):
        scores(drawn(10, 2), targets)


def test_values_to_be_predicted_are_no_classes(tmp_path: Path) -> None:
    """A column of them was one class, and every prediction right."""
    recipe = tiny(tmp_path)
    with (tmp_path / "mine.py").open("a") as file:
        file.write("""
def values():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(48, 8, generator=generator), torch.randn(48, 1, generator=generator)
    return TensorDataset(x, y), TensorDataset(x, y)

def net():
    return torch.nn.Linear(8, 1)
""")
    recipe = replace(recipe, dataset=f"{tmp_path}/mine.py:values", model=f"{tmp_path}/mine.py:net", model_args={})
    with pytest.raises(EspalierError, match="decimals are class probabilities"):
        train(recipe, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
