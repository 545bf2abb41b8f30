"""Code of the user's own draws from torch's, Python's and NumPy's global streams: a run's bits are its recipe's."""

# ruff: noqa: NPY002 — NumPy's global stream is what the user's code draws from.

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from standins import BlobSource, TinyNet, recipe
from torch import Tensor, nn

from espalier import data, models
from espalier.data import build_source
from espalier.train import Run, RunInterrupted, train

pytestmark = pytest.mark.usefixtures("stand_ins")


def draw() -> float:
    """Return a number that depends on all three streams."""
    return random.random() + float(np.random.rand()) + float(torch.rand(()))


class DrawingNet(TinyNet):
    """A net that draws a buffer when it is built, and at every pass, in evaluation too."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.register_buffer("drawn", torch.tensor(draw()))
        with torch.no_grad():
            self.head.bias.fill_(draw())

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images * draw())


class DrawingSource(BlobSource):
    """Images that are changed at random as they are read."""

    def train_batch(self, *where: Any) -> tuple[Tensor, Tensor]:
        images, labels = super().train_batch(*where)
        return images + draw(), labels

    def eval_batches(self, *how: Any) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in super().eval_batches(*how):
            yield images + draw(), labels


def drawing_init(model: nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        model.get_parameter("head.weight").mul_(draw())


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def outcome(run: Run) -> tuple[bytes, bytes, list[dict[str, Any]]]:
    rows = [{key: value for key, value in row.items() if "seconds" not in key} for row in run.rows]
    return (run.path / "start.safetensors").read_bytes(), (run.path / "final.safetensors").read_bytes(), rows


def test_a_seed_means_the_same_whatever_the_streams_and_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "build_model", lambda name, **arguments: DrawingNet(**arguments))
    monkeypatch.setattr(data, "build_source", lambda _: DrawingSource())
    monkeypatch.setattr("espalier.recipes.get_init", lambda _: drawing_init)
    asked = recipe(init="drawing", ema_decay=0.5, eval_batch_size=8)
    seed_all(1)
    first = train(asked, tmp_path / "first")
    seed_all(2)
    expected = draw()
    seed_all(2)
    second = train(asked, tmp_path / "second")
    assert draw() == expected
    assert outcome(first) == outcome(second)
    for stop in ((2, 3), (3, 0)):
        with monkeypatch.context() as patch:
            patch.setattr(data, "build_source", lambda _, stop=stop: DrawingSource(signal_at=(*stop, signal.SIGTERM)))
            with pytest.raises(RunInterrupted):
                train(asked, tmp_path / "cut")
        seed_all(sum(stop))
    assert outcome(train(asked, tmp_path / "cut")) == outcome(first)
    other = train(recipe(init="drawing", ema_decay=0.5, eval_batch_size=8, seed=1), tmp_path / "other")
    assert outcome(other) != outcome(first)
    assert load_file(other.path / "start.safetensors")["drawn"] != load_file(first.path / "start.safetensors")["drawn"]


def test_the_evaluation_draws_the_same_at_every_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "build_model", lambda name, **arguments: DrawingNet(**arguments))
    run = train(recipe(lr=1e-30, weight_decay=0.0, model_args={"norm": False}), tmp_path / "run")
    losses = [row["test/loss"] for row in run.rows]
    assert losses == [losses[0]] * len(losses)


def test_data_that_are_split_at_random_are_split_alike(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import random, numpy, torch\n"
        "from torch.utils.data import TensorDataset\n\n\n"
        "def split():\n"
        "    order = torch.randperm(20) + numpy.random.randint(9) + random.randrange(9)\n"
        "    pairs = TensorDataset(order.float()[:, None], order % 2)\n"
        "    return pairs, pairs\n"
    )
    found = []
    for seed in range(2):
        seed_all(seed)
        source = build_source(recipe(dataset=f"{tmp_path / 'mine.py'}:split", seed=seed))
        found.append(next(iter(source.eval_batches("test", 20)))[0])
    assert torch.equal(*found)
